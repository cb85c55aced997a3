"""What a full-attention layer can run: a policy's operators, every key, or a caller's function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from condensate_ext.kvcache import KVSummaries, attention_with_kvcache
from condensate_ext.ops import attention, attention_forward
from condensate_ext.transformers.cache import Summarised
from condensate_ext.transformers.policy import Policy
from condensate_ext.transformers.refusals import refuse


@dataclass(frozen=True)
class Inputs:
    """What a layer attends: query ``[B, Hq, Lq, D]``, key and value ``[B, Hkv, Lk, D]`` and
    ``[B, Hkv, Lk, Dv]``, the last query at the last key."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None
    sinks: Tensor | None  # [Hq], a logit of each head that joins its softmax

    def part(self, queries: slice, keys: slice, row: int | None = None) -> Inputs:
        """Some positions, of one row or of all."""
        rows = slice(None) if row is None else slice(row, row + 1)
        query = self.query[rows, :, queries]
        key, value = self.key[rows, :, keys], self.value[rows, :, keys]
        return replace(self, query=query, key=key, value=value)


class Compute(Protocol):
    """Causal attention of a full layer."""

    summaries: bool
    """Do steps read a cache layer's summaries?"""

    def of_layer(self, index: int) -> Compute:
        """What one layer runs."""
        return self

    def prompt(self, given: Inputs) -> Tensor:
        """``[B, Hq, Lq, Dv]``."""
        ...

    def step(
        self, given: Inputs, layer: Summarised, starts: tuple[int, ...] | None
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

    def prompt(self, given: Inputs) -> Tensor:
        return sparse(given, **self.policy.prefill)

    def step(
        self, given: Inputs, layer: Summarised, starts: tuple[int, ...] | None
    ) -> Tensor | None:
        if not self.summaries:
            return None
        return over_cache(given, layer, starts, layer.summaries(starts), **self.policy.decode)


class Dense(Compute):
    """Every key: what verifies a draft."""

    summaries = False

    def prompt(self, given: Inputs) -> Tensor:
        query, key, value = given.query, given.key, given.value
        if given.sinks is None and query.shape[2] == key.shape[2]:
            return F.scaled_dot_product_attention(
                query, key, value, scale=given.scale, is_causal=True, enable_gqa=True
            )
        return sparse(given, window=key.shape[2], anchors=0, topk=0)

    def step(
        self, given: Inputs, layer: Summarised, starts: tuple[int, ...] | None
    ) -> Tensor | None:
        window = layer.buffers()[0].shape[2]
        return over_cache(
            given, layer, starts, None, window=window, anchors=0, topk=0, shortlist=8
        )


class Replaced(Compute):
    """A function of the caller's, for prompts and steps alike."""

    summaries = False

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        self.compute = compute

    def prompt(self, given: Inputs) -> Tensor:
        if given.sinks is not None:
            refuse("attention sinks (s_aux)", "use condensed_attention, which has them")
        return self.compute(given.query, given.key, given.value, scale=given.scale)

    def step(self, *_: Any) -> Tensor | None:
        return None


def sparse(given: Inputs, **policy: Any) -> Tensor:
    """:func:`condensate_ext.attention` with sinks, and for values of another head_dim."""
    width, own = given.value.shape[-1], given.key.shape[-1]
    to = max(-(-max(width, own) // 8) * 8, 8)
    scale = own**-0.5 if given.scale is None else given.scale
    query, key, value = (
        x if x.shape[-1] == to else F.pad(x, (0, to - x.shape[-1]))
        for x in (given.query, given.key, given.value)
    )
    if given.sinks is None:
        out = attention(query, key, value, scale=scale, **policy)
    else:  # a sink only adds to the softmax's denominator
        out, lse = attention_forward(query, key, value, scale=scale, estimate=False, **policy)
        share = torch.sigmoid(lse - given.sinks.float().view(1, -1, 1))
        out = (out * share[..., None]).to(query.dtype)
    return out[..., :width]


def over_cache(
    given: Inputs,
    layer: Summarised,
    starts: tuple[int, ...] | None,
    summaries: list[KVSummaries] | None,
    **policy: Any,
) -> Tensor:
    """:func:`condensate_ext.attention_with_kvcache` over a layer, row by row where padded."""
    query, width = given.query, given.query.shape[-1]
    to = layer.buffers()[0].shape[-1]
    scale = width**-0.5 if given.scale is None else given.scale
    sinks = None if given.sinks is None else given.sinks.float()
    if to != width:
        query = F.pad(query, (0, to - width))
    outs: list[Any] = [
        attention_with_kvcache(
            query if starts is None else query[b : b + 1], *row, scale=scale, sinks=sinks,
            summaries=None if summaries is None else summaries[b], **policy,
        )
        for b, row in enumerate(layer.rows(starts))
    ]  # fmt: skip
    out: Tensor = outs[0] if starts is None else torch.cat(outs)
    return out[..., : given.value.shape[-1]]
