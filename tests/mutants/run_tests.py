"""Runs pytest against a package in a given folder: run_tests.py FOLDER PYTEST_ARGUMENTS..."""

from __future__ import annotations

import sys

import pytest

if __name__ == "__main__":
    folder, *arguments = sys.argv[1:]
    # An editable installation answers for the package by an import hook of its own.
    sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
    sys.path.insert(0, folder)
    import condensate_ext

    if not condensate_ext.__file__.startswith(folder):
        sys.exit(f"condensate_ext comes from {condensate_ext.__file__}, expected {folder}")
    sys.exit(pytest.main(arguments))
