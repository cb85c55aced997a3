"""``python -m condensate_ext``."""

import sys

from condensate_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
