"""What every command prints with: a console, progress, messages, files."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from condensate_ext._tables import WIDTH

if TYPE_CHECKING:
    from rich.console import Console

_EVERY = 20.0  # seconds between lines of progress without a terminal
FAILED, REFUSED, INTERRUPTED = 1, 2, 130  # exit status


def console() -> Console:
    """The terminal, or a file, never narrower than tables need."""
    from rich.console import Console

    return Console(width=max(WIDTH, Console().width), highlight=False)


def say(shown: Console, *lines: str) -> None:
    """Prints lines as they are."""
    for line in lines:
        shown.print(line, markup=False, soft_wrap=True)


def refuse(command: str, error: BaseException) -> int:
    """Says why a command did not start; returns its exit status."""
    print(f"condensate {command}: {error}", file=sys.stderr)
    return REFUSED


def interrupted(command: str, done: str) -> int:
    """Says what an interrupted command leaves; returns its exit status."""
    print(f"condensate {command}: interrupted; {done}", file=sys.stderr)
    return INTERRUPTED


def need(command: str, *packages: str) -> None:
    """Raises ImportError, saying how to add them, when packages of an extra are missing."""
    import importlib

    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"condensate {command} needs {package} ({error}): `pip install {package}`."
            ) from error


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


class Lines:
    """Progress as a line now and then, where there is no terminal to draw a bar on."""

    def __init__(self, command: str, file: TextIO, every: float = _EVERY) -> None:
        self.command, self.file, self.every = command, file, every

    def task(self, name: str) -> Callable[[float], None]:
        began = said = time.monotonic()
        total = 0.0

        def advance(share: float) -> None:
            nonlocal said, total
            total += share
            now = time.monotonic()
            finished = total > 1 - 1e-6
            if now - said < self.every and not finished:
                return
            said, spent = now, now - began
            left = "" if finished or not total else f", about {spent * (1 / total - 1):.0f} s left"
            line = f"{self.command}: {name} {100 * min(total, 1):.0f} %, {spent:.0f} s{left}"
            print(line, file=self.file, flush=True)

        return advance


@contextmanager
def progress(
    command: str, names: Sequence[str]
) -> Iterator[Callable[[str], Callable[[float], None]]]:
    """On stderr, a bar a task or lines: yields a function that begins a task and returns what its
    work calls with the share that it has done."""
    if not sys.stderr.isatty():
        yield Lines(command, sys.stderr).task
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {name: bars.add_task(name, total=1, start=False) for name in names}

        def begin(name: str) -> Callable[[float], None]:
            bars.start_task(tasks[name])
            return lambda share: bars.advance(tasks[name], share)

        yield begin
