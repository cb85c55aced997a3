"""The C++ API under ASan and UBSan: random parameters, random contents of right sizes."""

from __future__ import annotations

import os
import subprocess

from tools.scorecard.line import Line, Piece, Tally
from tools.scorecard.state import ROOT

BUILD = ROOT / "build" / "test" / "sanitize"  # as tools/test.sh has it
OPTIONS = (
    "-DCONDENSATE_CUDA=OFF", "-DCONDENSATE_BUILD_PYTHON=OFF", "-DCONDENSATE_BUILD_TESTS=ON",
    "-DCONDENSATE_BUILD_BENCH=ON", "-DCONDENSATE_SANITIZE=ON", "-DCONDENSATE_WERROR=ON",
)  # fmt: skip
CALLS = 1_000_000
REDUCED = 20_000


def _run(*command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], text=True, capture_output=True, check=False,
        env=os.environ | variables,
    )  # fmt: skip


def _built() -> str:
    """Builds the tests; returns what went wrong."""
    if not (BUILD / "build.ninja").exists():
        done = _run("cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *OPTIONS)
        if done.returncode != 0:
            return done.stderr
    done = _run("cmake", "--build", BUILD, "--target", "condensate_tests")
    return done.stdout[-500:] if done.returncode != 0 else ""


def run(piece: Piece) -> Tally:
    tally = Tally()
    if words := _built():
        tally.fail(f"it does not build: {words}")
        return tally
    calls = len(piece.share(CALLS, LINE.pieces["full"])) if piece.full else REDUCED
    for test in ("NullPointersAreRefused", "HostileContentsStayInBounds"):
        done = _run(
            BUILD / "condensate_tests", f"--gtest_filter=Fuzz.{test}",
            CONDENSATE_FUZZ_CALLS=str(calls), CONDENSATE_FUZZ_SEED=str(piece.rng().getrandbits(31)),
        )  # fmt: skip
        tally.count += calls
        if done.returncode != 0 or "1 test from" not in done.stdout:
            tally.fail(f"{test}: {(done.stdout + done.stderr)[-400:]}")
    return tally


LINE = Line(
    "C++ API",
    "calls",
    "1,000,000, 0 crashes, 0 out of bounds",
    {"reduced": 1, "full": 20},
    run,
    ("cpu",),
    why="Every function of the C++ API under ASan and UBSan: as many calls with parameters out of "
    "a hat and null pointers, which must be refused, as with right sizes over memory that ends "
    "where it should and hostile contents, which must succeed.",
)
