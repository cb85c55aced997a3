"""One wheel on several releases of torch; gigabytes are installed, so only at full size."""

from __future__ import annotations

import subprocess

from tools.scorecard.line import Line, Piece, Tally
from tools.scorecard.state import ROOT

RELEASES = ("2.11", "2.12", "2.13", "2.14")


def run(piece: Piece) -> Tally:
    tally = Tally()
    release = RELEASES[piece.index]
    done = subprocess.run(
        ["bash", "tools/torch_versions.sh", release], cwd=ROOT, text=True, capture_output=True,
        check=False,
    )  # fmt: skip
    words = (done.stdout + done.stderr).strip()
    tally.check(done.returncode == 0 and f"torch {release}" in words, words)
    return tally


LINE = Line(
    "torch releases",
    "minor releases",
    "4, all pass",
    {"reduced": 0, "full": len(RELEASES)},
    run,
    ("cpu",),
    why="The same wheel in a new environment with each release: doctor, then the tests of the "
    "interface, of states, and of torch's features, by `tools/torch_versions.sh`.",
)
