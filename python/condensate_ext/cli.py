"""The command line: ``python -m condensate_ext <command>``, also installed as ``condensate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def _doctor(arguments: list[str]) -> int:
    from condensate_ext import doctor

    return doctor.main(arguments)


def _demo(arguments: list[str]) -> int:
    # The demo parses its own arguments, and needs packages that the library does not.
    from condensate_ext import demo

    return demo.main(arguments)


def _evaluate(arguments: list[str]) -> int:
    from condensate_ext.evaluate import command

    return command.main(arguments)


COMMANDS = {
    "doctor": (_doctor, "show versions, devices and what is missing, and check that it works"),
    "demo": (_demo, "show on a real model what is attended and what that saves"),
    "evaluate": (_evaluate, "compare a language model with itself under dense attention"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="condensate", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, help_text) in COMMANDS.items():
        # Each command parses the rest itself, --help included.
        commands.add_parser(name, help=help_text, add_help=False)
    arguments, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    run, _ = COMMANDS[arguments.command]
    return run(rest)
