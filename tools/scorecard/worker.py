"""Runs the pieces of one line in this process: worker.py FOLDER LINE DEVICE SECONDS."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path

import torch
from condensate_ext._machine import cpu_name

from tools.scorecard.line import Line, Piece, Tally
from tools.scorecard.rows import LINES
from tools.scorecard.state import load


def card(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return cpu_name()


def run_piece(line: Line, piece: Piece) -> Tally:
    """The piece's tally; an exception that it lets through is a failure."""
    try:
        return line.run(piece)
    except Exception:
        tally = Tally(count=1)
        tally.fail(f"piece {piece.index}: {traceback.format_exc(limit=-3)}")
        return tally


def main(arguments: list[str]) -> int:
    folder, name, device, seconds = Path(arguments[0]), arguments[1], arguments[2], arguments[3]
    line = next(line for line in LINES if line.name == name)
    state = load(folder, name, device)
    if state is None:
        raise SystemExit(f"no state of {name} in {folder}")
    state.card, state.torch = card(device), torch.__version__
    deadline = time.monotonic() + float(seconds)
    while not state.is_done(line) and time.monotonic() < deadline:
        begin = time.monotonic()
        tally = run_piece(line, Piece(device, state.size, state.next, state.seed))
        state.add(tally, time.monotonic() - begin)
        state.save(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
