"""Runs lines of the scorecard, piece by piece, and writes the report."""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

from tools.scorecard.line import Line
from tools.scorecard.report import write_report
from tools.scorecard.rows import LINES
from tools.scorecard.state import ROOT, State, commit, load

LAST_LINE_SECONDS = 5  # with less left no line is begun


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.scorecard", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=["reduced", "full"], default="reduced")
    parser.add_argument("--seconds", type=float, default=540, help="stop after about so long")
    parser.add_argument("--only", action="append", metavar="LINE", help="may be repeated")
    parser.add_argument("--seed", type=int, help="of all calls; default: a new one")
    parser.add_argument("--commit", help="of the sources, where git cannot tell")
    parser.add_argument("--again", action="store_true", help="begin anew, keep nothing")
    parser.add_argument("--list", action="store_true", help="print the lines and stop")
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "scorecard")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the report goes")
    return parser.parse_args(arguments)


def begun(line: Line, options: argparse.Namespace) -> State:
    """The line's state, a new one where there is none of these sources and this size."""
    state = load(options.state, line.name, options.device)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**9)
    fresh = State(line.name, options.device, options.size, seed, options.commit or commit())
    if state is None or options.again or (state.commit, state.size) != (fresh.commit, fresh.size):
        fresh.save(options.state)
        return fresh
    return state


def work_on(line: Line, options: argparse.Namespace, deadline: float) -> State:
    """Runs pieces in processes of their own until the line or the time is at its end."""
    state = begun(line, options)
    while not state.is_done(line) and (left := deadline - time.monotonic()) > 0:
        command = [sys.executable, "-m", "tools.scorecard.worker", str(options.state), line.name]
        command += [options.device, str(left)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, text=True, capture_output=True, timeout=left + 300, check=False
            )
            status, words = done.returncode, done.stderr[-300:]
        except subprocess.TimeoutExpired:
            status, words = -1, "it hung"
        state = load(options.state, line.name, options.device) or state
        if status != 0:
            state.count += 1
            state.failed += 1
            state.failures.append(f"piece {state.next}: the process ended with {status}: {words}")
            state.next += 1
            state.save(options.state)
    return state


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    chosen = [line for line in LINES if options.device in line.devices]
    if options.only:
        unknown = set(options.only) - {line.name for line in LINES}
        if unknown:
            raise SystemExit(f"no line is called {sorted(unknown)}; --list shows all")
        chosen = [line for line in chosen if line.name in options.only]
    if options.list:
        print(*(f"{line.name:24} {line.target:28} {line.what}" for line in chosen), sep="\n")
        return 0
    deadline = time.monotonic() + options.seconds
    failed = False
    for line in chosen:
        if deadline - time.monotonic() < LAST_LINE_SECONDS:
            print("time is up; the same command goes on from here")
            break
        state = work_on(line, options, deadline)
        failed = failed or state.failed > 0
        part = "" if state.is_done(line) else f", piece {state.next} of {line.pieces[state.size]}"
        print(
            f"{line.name:24} {state.count:>9,} {line.what}: {state.failed} failed "
            f"({state.seconds:.0f} s{part})",
            flush=True,
        )
        print(*(f"    {words}" for words in state.failures[:3]), sep="\n", end="")
    write_report(options.state, options.docs)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
