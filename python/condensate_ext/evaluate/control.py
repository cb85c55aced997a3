"""Dense attention by another kernel than the baseline's: how far rounding alone moves a model."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_SCORES = 1 << 28  # scores held at once: 1 GiB in float32


def unfused_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None
) -> Tensor:
    """Causal dense attention that writes its scores down, in float32, a part of them at a time.

    Args:
        query: ``[B, Hq, Lq, D]``, the last of them at the last key.
        key: ``[B, Hkv, Lk, D]``.
        value: ``[B, Hkv, Lk, D]``.
        scale: factor of the scores, by default ``1 / sqrt(D)``.

    Returns:
        ``[B, Hq, Lq, D]`` in the query's dtype.
    """
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    texts = max(1, min(batch, _SCORES // (heads * queries * keys)))
    rows = max(1, min(queries, _SCORES // (texts * heads * keys)))
    out = torch.empty_like(query)
    for text, begin in itertools.product(range(0, batch, texts), range(0, queries, rows)):
        some, end = slice(text, text + texts), min(begin + rows, queries)
        seen = keys - queries + end
        visible = torch.ones(end - begin, seen, dtype=torch.bool, device=query.device)
        with sdpa_kernel(SDPBackend.MATH):
            out[some, :, begin:end] = F.scaled_dot_product_attention(
                query[some, :, begin:end],
                key[some, :, :seen],
                value[some, :, :seen],
                attn_mask=visible.tril(keys - queries + begin),
                scale=scale,
                enable_gqa=True,
            )
    return out
