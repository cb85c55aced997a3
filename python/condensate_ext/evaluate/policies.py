"""What a model's attention layers run: dense attention, its control, or a policy."""

from __future__ import annotations

import inspect
from typing import Any, Final, Literal

from condensate_ext.ops import attention

Policy = dict[str, Any]  # keyword arguments of condensate_ext.attention
CONTROL: Final = "control"  # dense attention by another kernel than the baseline's
Variant = Policy | Literal["control"] | None  # None: the baseline, dense through torch's SDPA

WINDOW, ANCHORS = 256, 64
_BLOCK = 64


def policy(
    selector: str,
    keys: int,
    *,
    far_field: bool | None = None,
    top_p: float | None = None,
    shortlist: int | None = None,
) -> Policy:
    """``keys`` per query in all: 64 anchors, a window of 256 and the selected ones.

    A ``shortlist``, which is of decoding steps, holds at least the selected keys. Arguments that
    are None are not named in the policy, so that the operator's own defaults hold.

    Raises:
        ValueError: the budget is too small, or not made of whole blocks where it must be.
    """
    topk = keys - WINDOW - ANCHORS
    if topk < 0:
        raise ValueError(
            f"budget: {keys} keys do not hold window {WINDOW} and anchors {ANCHORS}; use at least "
            f"{WINDOW + ANCHORS}."
        )
    if selector != "exact" and topk % _BLOCK:
        below = keys - topk % _BLOCK
        raise ValueError(
            f"budget: {keys} keys leave topk {topk} beside window {WINDOW} and anchors {ANCHORS}, "
            f"and selector '{selector}' takes whole blocks of {_BLOCK}; use {below} or "
            f"{below + _BLOCK}."
        )
    if shortlist is not None:
        shortlist = max(shortlist, -(-topk // 8) * 8)
    given = {"far_field": far_field, "top_p": top_p, "shortlist": shortlist}
    return {
        "window": WINDOW,
        "anchors": ANCHORS,
        "topk": topk,
        "selector": selector,
        **{name: value for name, value in given.items() if value is not None},
    }


def covering(context: int, selector: str = "block") -> Policy:
    """A budget that reaches every key of ``context`` tokens: it must equal dense attention."""
    return {"topk": (context + _BLOCK - 1) // _BLOCK * _BLOCK, "selector": selector}


def of_prompts(chosen: Policy) -> Policy:
    """The arguments of ``attention``: all but those of decoding steps."""
    return {name: value for name, value in chosen.items() if name != "shortlist"}


def effective(chosen: Policy, argument: str) -> Any:
    """The value that the operator uses: the policy's, or the operator's default."""
    return chosen.get(argument, inspect.signature(attention).parameters[argument].default)


def condenses(chosen: Policy) -> bool:
    """Does a call of the policy have a far field, where its budget leaves out anything?"""
    far_field = effective(chosen, "far_field")
    return effective(chosen, "selector") != "exact" if far_field is None else bool(far_field)


def keys_per_query(chosen: Policy) -> int:
    """The budget in keys: anchors, window and selected ones."""
    return sum(int(effective(chosen, part)) for part in ("window", "anchors", "topk"))


def selector_name(variant: Variant) -> str:
    """The selector, or which dense attention it is."""
    if variant is None:
        return "dense"
    if isinstance(variant, str):
        return "dense, unfused"
    return str(effective(variant, "selector"))
