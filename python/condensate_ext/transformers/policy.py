"""How much of a context a model's layers attend."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from condensate_ext._defaults import ANCHORS, CACHE_TOPK, SHORTLIST, TOPK, WINDOW
from condensate_ext._selectors import SELECTORS, Selector, listed

_UNIT = 8


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Arguments of :func:`condensate_ext.attention` for prompts and of
    :func:`condensate_ext.attention_with_kvcache` for decoding.

    >>> Policy(topk=1024).decode_topk
    1024
    >>> Policy().decode_topk  # with window and anchors 1,024 keys, a prompt's queries 2,048
    704
    """

    window: int = WINDOW
    """Last keys that a query attends."""
    anchors: int = ANCHORS
    """First keys of the sequence, attended by every query."""
    topk: int | None = None
    """Keys listed beside them. None: 1,728 in prompts and 704 in decoding, where lists are finer.
    A multiple of 64, but for ``selector="exact"``."""
    topk_per_head: Tensor | None = None
    """[Hkv] int32, see :func:`condensate_ext.attention`; decoding takes ``topk`` for all heads."""
    top_p: float | None = None
    """Softmax mass that a list must hold, in (0, 1]."""
    far_field: bool | None = None
    """Condense what is not attended. None: yes, but for ``selector="exact"``."""
    selector: Selector = "block"
    """How prompts are listed. Decoding lists tokens with ``"block"``, else as prompts do."""
    shortlist: int | None = None
    """Keys that a decoding step scores to find its tokens, a multiple of 8. None: 4,096, or
    ``topk`` where that is more."""

    def __post_init__(self) -> None:
        for name in ("window", "anchors"):
            _count(name, getattr(self, name), 1)
        if self.topk is not None:
            _count("topk", self.topk, 1 if self.selector == "exact" else 64)
        if self.shortlist is not None:
            _count("shortlist", self.shortlist, _UNIT)
            if self.shortlist < self.decode_topk:
                raise ValueError(
                    f"shortlist is {self.shortlist}, expected at least topk "
                    f"({self.decode_topk}); raise it or lower topk."
                )
        if self.selector not in SELECTORS:
            known = listed([f'"{name}"' for name in SELECTORS])
            raise ValueError(
                f'selector is "{self.selector}", expected {known}; "block" is the default.'
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected a number in (0, 1], or None.")
        if self.far_field and self.selector == "exact":
            raise ValueError(
                "far_field is True, but selector 'exact' has no far field; leave it out."
            )

    @classmethod
    def of(cls, function: str, values: dict[str, Any]) -> Policy:
        """A policy from keyword arguments of ``function``, which its errors name.

        Raises:
            TypeError: an argument is unknown, or the model sets it.
            ValueError: a value is not allowed.
        """
        if taken := {"causal", "scale"} & values.keys():
            raise TypeError(f"{function}: {sorted(taken)} come from the model; leave them out.")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(values.keys() - set(known)):
            raise TypeError(f"{function}: unknown {unknown}; a policy has {known}.")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{function}: {error}") from None

    @property
    def decode_topk(self) -> int:
        """Tokens that a decoding step lists."""
        return CACHE_TOPK if self.topk is None else self.topk

    @property
    def decode_shortlist(self) -> int:
        """Keys that a decoding step scores to find them."""
        if self.shortlist is not None:
            return self.shortlist
        return max(SHORTLIST, -(-self.decode_topk // _UNIT) * _UNIT)

    @property
    def prefill(self) -> dict[str, Any]:
        """Arguments of :func:`condensate_ext.attention`."""
        return {
            "window": self.window,
            "anchors": self.anchors,
            "topk": TOPK if self.topk is None else self.topk,
            "topk_per_head": self.topk_per_head,
            "top_p": self.top_p,
            "far_field": self.far_field,
            "selector": self.selector,
        }

    @property
    def decode(self) -> dict[str, Any]:
        """Arguments of :func:`condensate_ext.attention_with_kvcache`."""
        return {
            "window": self.window,
            "anchors": self.anchors,
            "topk": self.decode_topk,
            "shortlist": self.decode_shortlist,
            "top_p": self.top_p,
            "far_field": self.far_field is not False,
        }


def _count(name: str, value: Any, multiple: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or value % multiple:
        wanted = "a count of keys" if multiple == 1 else f"a multiple of {multiple}"
        fix = "pass such a number"
        if isinstance(value, int) and value > 0:
            below = value // multiple * multiple
            fix = f"pass {below} or {below + multiple}"
        raise ValueError(f"{name} is {value!r}, expected {wanted}, 0 or more; {fix}.")
