"""What a full-attention layer can run: a policy's operators, every key, or a caller's function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from condensate_ext.kvcache import attention_with_kvcache
from condensate_ext.ops import attention, attention_forward
from condensate_ext.transformers.cache import Summarised
from condensate_ext.transformers.policy import Policy
from condensate_ext.transformers.refusals import refuse


class Compute(Protocol):
    """Causal attention of a full layer. Query ``[B, Hq, Lq, D]``, key and value ``[B, Hkv, Lk,
    D]``, the last query at the last key; returns ``[B, Hq, Lq, D]``."""

    summaries: bool
    """Do steps read a cache layer's summaries?"""

    def of_layer(self, index: int) -> Compute:
        """What one layer runs."""
        return self

    def prompt(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, sinks: Tensor | None
    ) -> Tensor: ...

    def step(
        self,
        query: Tensor,
        layer: Summarised,
        starts: tuple[int, ...] | None,
        scale: float | None,
        sinks: Tensor | None,
    ) -> Tensor | None:
        """Of up to 16 queries over a cache layer; None where :meth:`prompt` has to do it."""
        ...


class Condensed(Compute):
    """A policy's operators; some layers may run others."""

    def __init__(self, policy: Policy, layers: Mapping[int, Compute] | None = None) -> None:
        self.policy = policy
        self.layers = dict(layers or {})
        self.summaries = policy.selector == "block"

    def of_layer(self, index: int) -> Compute:
        return self.layers.get(index, self)

    def prompt(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, sinks: Tensor | None
    ) -> Tensor:
        return sparse(query, key, value, scale, sinks, **self.policy.prefill)

    def step(
        self,
        query: Tensor,
        layer: Summarised,
        starts: tuple[int, ...] | None,
        scale: float | None,
        sinks: Tensor | None,
    ) -> Tensor | None:
        if not self.summaries:
            return None
        return over_cache(
            query, layer, starts, layer.summaries(starts), scale, sinks, **self.policy.decode
        )


class Dense(Compute):
    """Every key: what verifies a draft."""

    summaries = False

    def prompt(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, sinks: Tensor | None
    ) -> Tensor:
        if sinks is None and query.shape[2] == key.shape[2]:
            return F.scaled_dot_product_attention(
                query, key, value, scale=scale, is_causal=True, enable_gqa=True
            )
        window = key.shape[2]
        return sparse(query, key, value, scale, sinks, window=window, anchors=0, topk=0)

    def step(
        self,
        query: Tensor,
        layer: Summarised,
        starts: tuple[int, ...] | None,
        scale: float | None,
        sinks: Tensor | None,
    ) -> Tensor | None:
        window = layer.buffers()[0].shape[2]
        return over_cache(
            query, layer, starts, None, scale, sinks, window=window, anchors=0, topk=0, shortlist=8
        )


class Replaced(Compute):
    """A function of the caller's, for prompts and steps alike."""

    summaries = False

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        self.compute = compute

    def prompt(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, sinks: Tensor | None
    ) -> Tensor:
        if sinks is not None:
            refuse("attention sinks (s_aux)", "use condensed_attention, which has them")
        return self.compute(query, key, value, scale=scale)

    def step(self, *_: Any) -> Tensor | None:
        return None


def sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    sinks: Tensor | None,
    **policy: Any,
) -> Tensor:
    """:func:`condensate_ext.attention` with sinks, and for values of another head_dim."""
    width, own = value.shape[-1], key.shape[-1]
    to = max(-(-max(width, own) // 8) * 8, 8)
    if scale is None:
        scale = own**-0.5
    query, key, value = (x if x.shape[-1] == to else F.pad(x, (0, to - x.shape[-1]))
                         for x in (query, key, value))  # fmt: skip
    if sinks is None:
        out = attention(query, key, value, scale=scale, **policy)
    else:  # a sink only adds to the softmax's denominator
        out, lse = attention_forward(query, key, value, scale=scale, estimate=False, **policy)
        share = torch.sigmoid(lse - sinks.float().view(1, -1, 1))
        out = (out * share[..., None]).to(query.dtype)
    return out[..., :width]


def over_cache(
    query: Tensor,
    layer: Summarised,
    starts: tuple[int, ...] | None,
    summaries: list[Any] | None,
    scale: float | None,
    sinks: Tensor | None,
    **policy: Any,
) -> Tensor:
    """:func:`condensate_ext.attention_with_kvcache` over a layer, row by row where padded."""
    width = query.shape[-1]
    to = layer.buffers()[0].shape[-1]
    scale = width**-0.5 if scale is None else scale
    sinks = None if sinks is None else sinks.float()
    if to != width:
        query = F.pad(query, (0, to - width))
    rows = layer.rows(starts)
    outs: list[Any] = [
        attention_with_kvcache(
            query if starts is None else query[b : b + 1], *row, scale=scale, sinks=sinks,
            summaries=None if summaries is None else summaries[b], **policy,
        )
        for b, row in enumerate(rows)
    ]  # fmt: skip
    out: Tensor = outs[0] if starts is None else torch.cat(outs)
    return out
