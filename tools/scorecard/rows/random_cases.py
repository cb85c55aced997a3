"""Random calls against the definition, on every path of the device."""

from __future__ import annotations

import os

import torch

from tests.test_paths import runs_on
from tests.testkit.cases import from_seed
from tests.testkit.checks import check_case
from tests.testkit.repro import line
from tools.scorecard.line import Line, Piece, Tally

CASES = {"reduced": 6, "full": 64}  # a piece
PATHS = {"cpu": ("",), "cuda": ("", "sm80", "simt")}  # "" leaves the choice to the plan


def run(piece: Piece) -> Tally:
    tally = Tally()
    rng = piece.rng()
    for _ in range(CASES[piece.size]):
        seed = rng.randrange(10**9)
        case = from_seed(seed, piece.device)
        for path in PATHS[piece.device]:
            if path and not runs_on(case, path):
                continue
            os.environ["CONDENSATE_FORCE_PATH"] = path
            try:
                outcome = check_case(case)
                tally.add("membership probes", outcome.probes)
                tally.check(True, "")
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                tally.check(
                    False, f"{error}; CONDENSATE_FORCE_PATH={path} {line(piece.device, seed)}"
                )
            finally:
                os.environ.pop("CONDENSATE_FORCE_PATH")
    return tally


LINE = Line(
    "random configurations",
    "calls",
    "4,096, 0 wrong",
    {"reduced": 2, "full": 64},
    run,
    why="A random call of any shape, dtype, layout, selector and budget; outputs and log-sum-exps "
    "within the bound of float32 accumulation, lists and thresholds by their order, membership by "
    "markers. On CUDA also on each forced path that can run it.",
)
