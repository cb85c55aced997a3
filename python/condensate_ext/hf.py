"""Runs a Hugging Face causal language model through condensate attention.

>>> with torch.no_grad(), condensed_attention(model, topk=1728):
...     model.generate(input_ids, max_new_tokens=64)

Needs transformers 5 (its ``AttentionInterface``). The hook covers prefill, chunked prefill and
decoding with a growing cache, any grouping of query heads, and batches of equal length. What it
cannot compute right it refuses: padding, sliding windows, packed sequences, fixed-size caches,
soft-capped scores, attention sinks, training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from condensate_ext.ops import attention

AttentionFunction = Callable[..., Tensor]

_names = (f"condensate_{index}" for index in itertools.count())

# Keyword arguments that transformers passes to attention and that change what is computed.
_UNSUPPORTED = {
    "sliding_window": "a sliding window",
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "head_mask": "a head mask",
}


def _refuse(what: str, instead: str) -> None:
    raise NotImplementedError(f"condensed_attention cannot honour {what}; {instead}.")


def _check_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    **_: Any,
) -> None:
    """Takes the place of transformers' mask: the op masks by position, so nothing is built.

    transformers calls this once per forward pass. Without it, a padding mask would be dropped
    without a word.
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function is not causal_mask_function:
        _refuse(
            "a mask that is not plainly causal (sliding window, packed sequences, bidirectional)",
            "use one unpacked sequence per batch row and a model with full causal attention",
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        _refuse(
            "a padding mask (attention_mask has zeros)",
            "batch prompts of equal length, or run them one at a time",
        )
    if int(q_offset) + q_length != kv_length or int(kv_offset) != 0:
        _refuse(
            f"a cache of {kv_length} places with {int(q_offset) + q_length} filled",
            "use a cache that grows, DynamicCache, the default of generate()",
        )


def _hook(compute: AttentionFunction) -> Callable[..., tuple[Tensor, None]]:
    """The function that transformers calls in every layer: refuses, then computes."""

    def replaced(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is not None:
            _refuse("an explicit attention mask", "pass none, or a 2-D one without zeros")
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            _refuse("bidirectional attention", "call condensate_ext.attention(causal=False)")
        if dropout:
            _refuse(f"dropout={dropout}", "call model.eval() first")
        for name, what in _UNSUPPORTED.items():
            if kwargs.get(name) is not None:
                _refuse(f"{what} ({name})", "use a model without it")
        out = compute(query, key, value, scale=scaling)
        return out.transpose(1, 2).contiguous(), None  # transformers wants [B, L, H, D]

    return replaced


@contextmanager
def replaced_attention(model: Any, compute: AttentionFunction) -> Iterator[None]:
    """Lets every attention layer of ``model`` call ``compute`` meanwhile, in the order of layers.

    Args:
        model: a transformers model that supports ``set_attn_implementation``, in eval mode.
        compute: ``compute(query, key, value, *, scale)`` for causal attention; query
            ``[B, Hq, Lq, D]``, key and value ``[B, Hkv, Lk, D]`` with positions encoded, in the
            model's dtype, the last query at the last key; returns ``[B, Hq, Lq, D]``.

    Raises:
        NotImplementedError: from the forward pass, when it needs what this hook cannot compute.
        RuntimeError: the model does not go through transformers' attention interface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    name = next(_names)
    before = model.config._attn_implementation
    AttentionInterface.register(name, _hook(compute))
    AttentionMaskInterface.register(name, _check_mask)
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise RuntimeError(
                f"{type(model).__name__} does not use transformers' AttentionInterface, so its "
                "attention cannot be replaced; use a model that does."
            )
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


@contextmanager
def condensed_attention(model: Any, **policy: Any) -> Iterator[None]:
    """Lets every attention layer of ``model`` run :func:`condensate_ext.attention` meanwhile.

    A cache that was filled densely may be continued inside, and the other way round.

    Args:
        model: a transformers model that supports ``set_attn_implementation``, in eval mode.
        policy: ``window``, ``anchors``, ``topk``, ``selector``, ``far_field`` and further keyword
            arguments of :func:`condensate_ext.attention`, except ``causal`` and ``scale``, which
            the model sets.

    Raises:
        TypeError: ``causal`` or ``scale`` was given.
        NotImplementedError: from the forward pass, when it needs what this hook cannot compute.
        RuntimeError: the model does not go through transformers' attention interface.
    """
    if taken := {"causal", "scale"} & policy.keys():
        raise TypeError(f"condensed_attention: {sorted(taken)} come from the model; leave them out")
    with replaced_attention(model, partial(attention, **policy)):
        yield
