"""The command line: ``condensate <command>``, also ``python -m condensate_ext <command>``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

# Options that take several values after one name, as in --budgets 1024 2048.
_SEVERAL = ("--budgets", "--selectors", "--protocols", "--lengths", "--keys", "--tasks")


def _spread(arguments: Sequence[str]) -> list[str]:
    """Repeats the name of such an option before each of its values, as typer takes them."""
    spread: list[str] = []
    name = None
    for argument in arguments:
        if argument.startswith("--"):
            name = argument if argument in _SEVERAL else None
            if name is None:
                spread.append(argument)
        elif name is not None:
            spread += [name, argument]
        else:
            spread.append(argument)
    return spread


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 for a failure, 2 for wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        from condensate_ext.commands.app import app
    except ImportError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"condensate needs {error.name} ({error}): `pip install {error.name}` adds it.")
        return 1
    try:
        return int(app()(_spread(arguments), prog_name="condensate") or 0)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
