"""Run random cases again: `python -m tests.testkit.repro DEVICE SEED [SEED ...]`."""

from __future__ import annotations

import sys

from tests.testkit.cases import from_seed
from tests.testkit.checks import check_case


def line(device: str, seed: int) -> str:
    """The command that runs a case again."""
    return f"python -m tests.testkit.repro {device} {seed}"


def main(arguments: list[str]) -> None:
    device, *seeds = arguments
    for seed in seeds:
        case = from_seed(int(seed), device)
        print(case)
        print(check_case(case))


if __name__ == "__main__":
    main(sys.argv[1:])
