"""The first stage of ``selector="exact"`` by itself, for tests and tools: no attention takes its
result, so it is not part of the package's interface."""

from __future__ import annotations

import torch
from torch import Tensor

from condensate_ext._arguments import checked
from condensate_ext._defaults import ANCHORS, TOPK, WINDOW
from condensate_ext._loader import require


@checked
def select_tokens(
    query: Tensor,
    key: Tensor,
    *,
    window: int = WINDOW,
    anchors: int = ANCHORS,
    topk: int = TOPK,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Finds the ``topk`` highest-scoring keys outside anchors and window, per query and head.

    The set is kept as a pair: such a key ``j`` is selected when its score ``scale * q·k`` exceeds
    ``threshold``, or equals it and ``j <= tie_index``. Scores that are NaN are never selected.

    Args:
        query: ``[B, Hq, Lq, D]``.
        key: ``[B, Hkv, Lk, D]``.
        window: as for :func:`condensate_ext.attention`.
        anchors: as for :func:`condensate_ext.attention`.
        topk: keys to select, any number.
        causal: as for :func:`condensate_ext.attention`.
        scale: as for :func:`condensate_ext.attention`.

    Returns:
        A tuple of ``threshold`` ``[B, Hq, Lq]`` float32, ``-inf`` where fewer than ``topk`` keys
        can be selected, and ``tie_index`` ``[B, Hq, Lq]`` int32.

    Raises:
        ValueError: an argument is invalid.
        RuntimeError: an input requires grad, or this build or device cannot run the call.
    """
    require()
    threshold, tie_index = torch.ops.condensate.select_tokens(
        query, key, window=window, anchors=anchors, topk=topk, causal=causal, scale=scale
    )
    return threshold, tie_index
