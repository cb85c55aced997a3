"""What transformers calls in every layer in place of its own attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condensate_ext.kvcache import HEAD_DIMS, MAX_QUERIES
from condensate_ext.transformers.cache import layer_of
from condensate_ext.transformers.computes import Compute, Inputs, sparse
from condensate_ext.transformers.masks import FIXED, PADDED
from condensate_ext.transformers.refusals import layer_name, refuse

_HEAD_DIM = 256  # of the prefill kernels, in multiples of 8

# Keyword arguments that transformers passes to attention and that change nothing it computes.
_HARMLESS = {
    "position_ids", "cache_position", "position_embeddings", "use_cache", "return_dict",
    "output_hidden_states", "output_router_logits", "num_items_in_batch", "logits_to_keep",
    "kwargs", "target_dtype", "deterministic", "training", "input_ids", "token_type_ids",
}  # fmt: skip
_OFF_WHEN_FALSE = {"output_attentions", "is_cross_attention"}


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
    given = Inputs(query, key, value, scaling, s_aux)
    kind = None if mask is None else mask.dtype
    windowed = kind in (torch.int16, torch.uint8)
    if sliding_window is not None and not windowed and sliding_window < key.shape[2]:
        refuse(
            f"a window of {sliding_window} keys without a mask that says so", "report this model",
            module,
        )
    if kind is None:
        return _full(compute, given)
    if mask is None or mask.dim() != 4:
        refuse(f"an attention mask of shape {_shape(mask)}", "pass none, or a 2-D one", module)
    if kind is torch.int64 and mask.shape[-1] == FIXED:
        return _fixed(compute, given, mask)
    if kind is torch.int64 and mask.shape[-1] == PADDED:
        return _padded(compute, given, mask)
    if kind is torch.int32:
        return _packed(compute, given, mask)
    if kind is torch.int16:
        return sparse(given, window=mask.shape[-1], anchors=0, topk=0, far_field=False)
    if kind is torch.uint8:
        return _dense(given, mask.bool())
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


def _step(compute: Compute, given: Inputs, starts: tuple[int, ...] | None = None) -> Tensor | None:
    """A few queries over a cache layer with summaries; None where this is none."""
    layer = layer_of(given.key, given.value)
    if layer is None:
        return None
    keys, values = layer.buffers()
    if keys.dtype == torch.float32 and keys.is_cuda:
        return None  # the CUDA decode kernels have 16-bit queries alone
    if keys.shape[-1] != values.shape[-1] or keys.shape[-1] not in HEAD_DIMS:
        return None
    if given.query.shape[2] > MAX_QUERIES:
        if compute.summaries:
            layer.summaries(starts)  # before a step is captured in a graph
        return None
    return compute.step(given, layer, starts)


def _full(compute: Compute, given: Inputs) -> Tensor:
    out = _step(compute, given)
    return compute.prompt(given) if out is None else out


def _fixed(compute: Compute, given: Inputs, mask: Tensor) -> Tensor:
    """A cache of fixed size: only its first keys are in use."""
    out = _step(compute, given)
    if out is not None:
        return out
    return compute.prompt(given.part(slice(None), slice(0, int(mask[0, 0, 0, 0]))))


def _padded(compute: Compute, given: Inputs, mask: Tensor) -> Tensor:
    """Each row over its own keys. Queries of padding get output 0."""
    if torch.compiler.is_compiling():
        refuse("padding in a compiled forward pass", "compile for prompts of one length")
    bounds = mask[:, 0, 0].tolist()
    used, first = bounds[0][:2]
    if first == 0 or all(start <= first and end == used for _, _, start, end in bounds):
        out = _step(compute, given, tuple(start for _, _, start, _ in bounds))
        if out is not None:
            return out
    query = given.query
    out = query.new_zeros((*query.shape[:3], given.value.shape[-1]))
    for b, (_, _, start, end) in enumerate(bounds):
        begin, stop = max(start - first, 0), min(end - first, query.shape[2])
        if begin < stop:
            own = given.part(slice(begin, stop), slice(start, first + stop), b)
            out[b : b + 1, :, begin:stop] = compute.prompt(own)
    return out


def _packed(compute: Compute, given: Inputs, mask: Tensor) -> Tensor:
    """Several sequences one after another in a row, each by itself."""
    query = given.query
    out = query.new_empty((*query.shape[:3], given.value.shape[-1]))
    for b, sequences in enumerate(mask[:, 0, 0].expand(query.shape[0], -1)):
        lengths = torch.unique_consecutive(sequences, return_counts=True)[1].tolist()
        begin = 0
        for length in lengths:
            own = slice(begin, begin + length)
            out[b : b + 1, :, own] = compute.prompt(given.part(own, own, b))
            begin += length
    return out


def _dense(given: Inputs, mask: Tensor) -> Tensor:
    """Layers of a window or chunk whose mask is needed key by key: exact, as the model has it."""
    query, key, value, scale = given.query, given.key, given.value, given.scale
    group = query.shape[1] // key.shape[1]
    if given.sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=group > 1
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = (query @ key.mT).float() * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    sink = given.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return weights.to(value.dtype) @ value


def explain(error: Exception, module: torch.nn.Module) -> Exception:
    """The error of an operator, with the layer that called it."""
    error.add_note(f"in {layer_name(module)}, through condensate attention")
    return error
