"""What transformers calls in every layer in place of its own attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from condensate_ext.kvcache import attention_with_kvcache
from condensate_ext.ops import attention, attention_forward
from condensate_ext.transformers.cache import DECODE_HEAD_DIMS, Summarised, layer_of
from condensate_ext.transformers.masks import FIXED, PADDED
from condensate_ext.transformers.policy import Policy
from condensate_ext.transformers.refusals import layer_name, refuse

DECODE_QUERIES = 16
_HEAD_DIM = 256  # of the prefill kernels, in multiples of 8

# Keyword arguments that transformers passes to attention and that change nothing it computes.
_HARMLESS = {
    "position_ids", "cache_position", "position_embeddings", "use_cache", "return_dict",
    "output_hidden_states", "output_router_logits", "num_items_in_batch", "logits_to_keep",
    "kwargs", "target_dtype", "deterministic", "training", "input_ids", "token_type_ids",
}  # fmt: skip
_OFF_WHEN_FALSE = {"output_attentions", "is_cross_attention"}


class Compute(Protocol):
    """Causal attention of a full layer. Query ``[B, Hq, Lq, D]``, key and value ``[B, Hkv, Lk,
    D]``, the last query at the last key; returns ``[B, Hq, Lq, D]``."""

    summaries: bool
    """Do steps read a cache layer's summaries?"""

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


class Condensed:
    """A policy's operators."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.summaries = policy.selector == "block"

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


class Dense:
    """Every key, by the operators of this package: what verifies a draft."""

    summaries = False

    def prompt(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, sinks: Tensor | None
    ) -> Tensor:
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


class Replaced:
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
    """:func:`condensate_ext.attention_with_kvcache` over a layer's buffers, row by row if padded."""
    width = query.shape[-1]
    to = layer.buffers()[0].shape[-1]
    scale = width**-0.5 if scale is None else scale
    sinks = None if sinks is None else sinks.float()
    if to != width:
        query = F.pad(query, (0, to - width))
    rows = layer.rows(starts)
    outs = [
        attention_with_kvcache(
            query if starts is None else query[b : b + 1], *row, scale=scale, sinks=sinks,
            summaries=None if summaries is None else summaries[b], **policy,
        )
        for b, row in enumerate(rows)
    ]  # fmt: skip
    return outs[0] if starts is None else torch.cat(outs)


def attend(
    compute: Compute,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **rest: Any,
) -> Tensor:
    """Attention of one layer by its mask (masks.py): ``[B, Hq, Lq, Dv]``."""
    _check(module, key, value, dropout, softcap, is_causal, rest)
    kind = None if mask is None else mask.dtype
    windowed = kind in (torch.int16, torch.uint8)
    if sliding_window is not None and not windowed and sliding_window < key.shape[2]:
        refuse(
            f"a window of {sliding_window} keys without a mask that says so", "report this model",
            module,
        )
    if kind is None:
        return _full(compute, query, key, value, scaling, s_aux)
    if mask is None or mask.dim() != 4:
        refuse(f"an attention mask of shape {_shape(mask)}", "pass none, or a 2-D one", module)
    if kind is torch.int64 and mask.shape[-1] == FIXED:
        return _fixed(compute, query, key, value, scaling, s_aux, mask)
    if kind is torch.int64 and mask.shape[-1] == PADDED:
        return _padded(compute, query, key, value, scaling, s_aux, mask)
    if kind is torch.int32:
        return _packed(compute, query, key, value, scaling, s_aux, mask)
    if kind is torch.int16:
        window = mask.shape[-1]
        return sparse(
            query, key, value, scaling, s_aux, window=window, anchors=0, topk=0, far_field=False
        )
    if kind is torch.uint8:
        return _dense(query, key, value, scaling, s_aux, mask.bool())
    refuse(
        "an explicit attention mask", "pass none, or a 2-D one that tells padding from text", module
    )


def _shape(mask: Tensor | None) -> list[int]:
    return [] if mask is None else list(mask.shape)


def _check(
    module: torch.nn.Module,
    key: Tensor,
    value: Tensor,
    dropout: float,
    softcap: float | None,
    is_causal: bool | None,
    rest: dict[str, Any],
) -> None:
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        refuse("bidirectional attention", "call condensate_ext.attention(causal=False)", module)
    if dropout:
        refuse(f"dropout={dropout}", "call model.eval() first", module)
    if softcap is not None:
        refuse(f"scores capped at {softcap} (softcap)", "run this model as it is", module)
    width = max(key.shape[-1], value.shape[-1])
    if width > _HEAD_DIM:
        refuse(f"head_dim {width}", f"the kernels reach {_HEAD_DIM}; run it as it is", module)
    for name, given in rest.items():
        if given is None or name in _HARMLESS or (name in _OFF_WHEN_FALSE and given is False):
            continue
        refuse(
            f"the argument {name}={_brief(given)} of the model's attention",
            "leave it out, or run this model as it is",
            module,
        )


def _brief(given: Any) -> str:
    return f"a tensor {list(given.shape)}" if isinstance(given, Tensor) else repr(given)[:40]


def _step(
    compute: Compute,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    sinks: Tensor | None,
    starts: tuple[int, ...] | None = None,
) -> Tensor | None:
    """A few queries over a cache layer with summaries; None where this is none."""
    layer = layer_of(key)
    if layer is None:
        return None
    keys, values = layer.buffers()
    if keys.dtype == torch.float32 and keys.is_cuda:
        return None  # the CUDA decode kernels have 16-bit queries alone
    if keys.shape[-1] != values.shape[-1] or keys.shape[-1] not in DECODE_HEAD_DIMS:
        return None
    if query.shape[2] > DECODE_QUERIES:
        if compute.summaries:
            layer.summaries(starts)  # before a step is captured in a graph
        return None
    out = compute.step(query, layer, starts, scale, sinks)
    return None if out is None else out[..., : value.shape[-1]]


def _full(
    compute: Compute,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    sinks: Tensor | None,
) -> Tensor:
    out = _step(compute, query, key, value, scale, sinks)
    return compute.prompt(query, key, value, scale, sinks) if out is None else out


def _fixed(
    compute: Compute,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    sinks: Tensor | None,
    mask: Tensor,
) -> Tensor:
    """A cache of fixed size: only its first keys are in use."""
    out = _step(compute, query, key, value, scale, sinks)
    if out is not None:
        return out
    used = int(mask[0, 0, 0, 0])
    return compute.prompt(query, key[:, :, :used], value[:, :, :used], scale, sinks)


def _padded(
    compute: Compute,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    sinks: Tensor | None,
    mask: Tensor,
) -> Tensor:
    """Each row over its own keys. Queries of padding get output 0."""
    if torch.compiler.is_compiling():
        refuse("padding in a compiled forward pass", "compile for prompts of one length")
    bounds = mask[:, 0, 0].tolist()
    used, first = bounds[0][:2]
    if all(start <= first and end == used for _, _, start, end in bounds) or first == 0:
        starts = tuple(start for _, _, start, _ in bounds)
        out = _step(compute, query, key, value, scale, sinks, starts)
        if out is not None:
            return out
    out = query.new_zeros((*query.shape[:3], value.shape[-1]))
    for b, (_, _, start, end) in enumerate(bounds):
        begin, stop = max(start - first, 0), min(end - first, query.shape[2])
        if begin < stop:
            keys = slice(start, first + stop)
            row = slice(b, b + 1)
            out[row, :, begin:stop] = compute.prompt(
                query[row, :, begin:stop], key[row, :, keys], value[row, :, keys], scale, sinks
            )
    return out


def _packed(
    compute: Compute,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    sinks: Tensor | None,
    mask: Tensor,
) -> Tensor:
    """Several sequences one after another in a row, each by itself."""
    out = query.new_empty((*query.shape[:3], value.shape[-1]))
    for b, sequences in enumerate(mask[:, 0, 0].expand(query.shape[0], -1)):
        lengths = torch.unique_consecutive(sequences, return_counts=True)[1].tolist()
        begin = 0
        for length in lengths:
            part = (slice(b, b + 1), slice(None), slice(begin, begin + length))
            out[part] = compute.prompt(query[part], key[part], value[part], scale, sinks)
            begin += length
    return out


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    sinks: Tensor | None,
    mask: Tensor,
) -> Tensor:
    """Layers of a window or chunk whose mask is needed key by key: exact, as the model has it."""
    group = query.shape[1] // key.shape[1]
    if sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=group > 1
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = (query @ key.mT).float() * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return weights.to(value.dtype) @ value


def explain(error: Exception, module: torch.nn.Module) -> Exception:
    """The error of an operator, with the layer that called it."""
    error.add_note(f"in {layer_name(module)}, through condensate attention")
    return error
