"""The selectors' names and the numbers that the operators take for them.

Numbers, because torch's stable ABI leaves a string behind for every ``str`` argument of a call.
"""

from __future__ import annotations

from typing import Literal

BlockSelector = Literal["block", "quest", "mean"]
Selector = Literal["block", "quest", "mean", "exact"]

SELECTORS: dict[str, int] = {"block": 0, "quest": 1, "mean": 2, "exact": 3}
"""``condensate::Selector`` of csrc/include/condensate/types.h, by name."""


def selector_number(op: str, name: str) -> int:
    """What the operators take for a selector's name; ValueError when it is none."""
    number = SELECTORS.get(name) if isinstance(name, str) else None
    if number is None:
        shown = f'"{name}"' if isinstance(name, str) else repr(name)
        raise ValueError(
            f"{op}: selector is {shown}, expected "
            '"block", "quest", "mean" or "exact"; "block" is the default.'
        )
    return number
