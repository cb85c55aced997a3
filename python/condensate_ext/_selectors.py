"""The selectors' names and the numbers that the operators take for them.

Numbers, because torch's stable ABI leaves a string behind for every ``str`` argument of a call.
"""

from __future__ import annotations

from typing import Literal, get_args

BlockSelector = Literal["block", "quest", "mean"]
Selector = Literal["block", "quest", "mean", "exact"]

SELECTORS: dict[str, int] = {"block": 0, "quest": 1, "mean": 2, "exact": 3}
"""``condensate::Selector`` of csrc/include/condensate/types.h, by name."""

ROWS_PER_BLOCK = {SELECTORS["block"]: 8 + 1, SELECTORS["quest"]: 4, SELECTORS["mean"]: 1}
"""Rows of a block's summaries, by number, as ``selector_traits`` of selectors.h has them."""


def listed(names: list[str]) -> str:
    """As in a sentence: a, b or c."""
    return " or ".join([", ".join(names[:-1]), names[-1]])


BLOCK_NAMES = listed([f'"{name}"' for name in get_args(BlockSelector)])


def selector_number(op: str, name: str) -> int:
    """What the operators take for a selector's name; ValueError when it is none."""
    number = SELECTORS.get(name) if isinstance(name, str) else None
    if number is None:
        shown = f'"{name}"' if isinstance(name, str) else repr(name)
        raise ValueError(
            f"{op}: selector is {shown}, expected "
            + listed([f'"{known}"' for known in SELECTORS])
            + '; "block" is the default.'
        )
    return number
