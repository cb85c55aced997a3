"""The commands as one typer application."""

from __future__ import annotations

from collections.abc import Callable

import typer

from condensate_ext.commands import bench, calibrate, demo, doctor, evaluate, generate

COMMANDS: dict[str, Callable[..., None]] = {
    "doctor": doctor.command,
    "bench": bench.command,
    "evaluate": evaluate.command,
    "calibrate": calibrate.command,
    "generate": generate.command,
    "demo": demo.command,
}


def app() -> typer.Typer:
    """Calling it with arguments ends in SystemExit."""
    made = typer.Typer(
        help="Attention over anchors, a window and selected keys: check it, time it, judge it.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for name, command in COMMANDS.items():
        made.command(name)(command)
    return made
