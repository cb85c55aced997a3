"""The plugin's settings, from environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from condensate_ext._defaults import ANCHORS, CACHE_TOPK, SHORTLIST, TOPK, WINDOW

PREFIX = "CONDENSATE_VLLM_"


def _fail(name: str, value: str, expected: str) -> NoReturn:
    raise ValueError(
        f"{PREFIX}{name} is {value!r}, expected {expected}; set it so, or unset it for the default."
    )


def _count(environment: Mapping[str, str], name: str, default: int, multiple: int = 1) -> int:
    text = environment.get(PREFIX + name)
    if text is None:
        return default
    kind = "an integer >= 0" if multiple == 1 else f"a multiple of {multiple} >= 0"
    if not text.isdecimal() or int(text) % multiple:
        _fail(name, text, kind)
    return int(text)


def _share(environment: Mapping[str, str], name: str) -> float | None:
    text = environment.get(PREFIX + name)
    if text is None:
        return None
    try:
        share = float(text)
    except ValueError:
        _fail(name, text, "a number in (0, 1]")
    if not 0 < share <= 1:
        _fail(name, text, "a number in (0, 1]")
    return share


@dataclass(frozen=True)
class Settings:
    """What a condensed layer attends; docs/serving.md tells how to choose it."""

    window: int = WINDOW
    """``CONDENSATE_VLLM_WINDOW``: keys before and with each query."""
    anchors: int = ANCHORS
    """``CONDENSATE_VLLM_ANCHORS``: first keys of a sequence."""
    topk: int = CACHE_TOPK
    """``CONDENSATE_VLLM_TOPK``: tokens listed in steps of up to 16 new tokens."""
    shortlist: int = SHORTLIST
    """``CONDENSATE_VLLM_SHORTLIST``: keys scored to find them; up to so many are all attended."""
    top_p: float | None = None
    """``CONDENSATE_VLLM_TOP_P``: softmax mass that a step's list must hold; None for ``topk``."""
    prefill_topk: int = TOPK
    """``CONDENSATE_VLLM_PREFILL_TOPK``: keys listed for longer chunks of a prompt."""
    skip_layers: frozenset[str] = field(default_factory=frozenset)
    """``CONDENSATE_VLLM_SKIP_LAYERS``: names or numbers of layers left to vLLM, by commas."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Reads and checks the variables.

        Args:
            environment: as ``os.environ``.

        Raises:
            ValueError: a variable is invalid or unknown.
        """
        known = {"WINDOW", "ANCHORS", "TOPK", "SHORTLIST", "TOP_P", "PREFILL_TOPK", "SKIP_LAYERS"}
        for name in environment:
            if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in known:
                allowed = ", ".join(PREFIX + k for k in sorted(known))
                raise ValueError(f"{name} is no setting, expected {allowed}; unset it.")
        names = environment.get(PREFIX + "SKIP_LAYERS", "").split(",")
        settings = cls(
            _count(environment, "WINDOW", WINDOW),
            _count(environment, "ANCHORS", ANCHORS),
            _count(environment, "TOPK", CACHE_TOPK),
            _count(environment, "SHORTLIST", SHORTLIST, multiple=8),
            _share(environment, "TOP_P"),
            _count(environment, "PREFILL_TOPK", TOPK, multiple=64),
            frozenset(name.strip() for name in names if name.strip()),
        )
        if settings.topk > settings.shortlist:
            _fail("TOPK", str(settings.topk), f"at most the shortlist, {settings.shortlist}")
        return settings

    def skips(self, layer_name: str) -> bool:
        """Is the layer left to vLLM? By its name or by a number that is part of it."""
        return layer_name in self.skip_layers or bool(
            self.skip_layers.intersection(layer_name.split("."))
        )
