"""Passes of a causal language model: prefill, single steps, greedy continuation.

Token ids are int64 ``[B, n]`` on the model's device; sequences of a batch have equal length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from condensate_ext.evaluate.control import unfused_attention
from condensate_ext.evaluate.policies import Variant
from condensate_ext.transformers import condensed_attention, replaced_attention

Advance = Callable[[float], None]  # called with the share of its work that a function has done


def silent(_: float) -> None:
    """Reports progress to nobody."""


def share_of(advance: Advance, parts: int) -> Advance:
    """What one of ``parts`` equal parts of the work reports to."""
    return lambda done: advance(done / parts)


def attended(model: Any, variant: Variant) -> AbstractContextManager[None]:
    """The model with its attention layers running ``variant`` meanwhile."""
    if variant is None:
        return nullcontext()
    if isinstance(variant, str):
        return replaced_attention(model, unfused_attention)
    return condensed_attention(model, **variant)


def _cache_keyword(module: Any) -> str:
    """What the forward pass calls its cache: later versions of transformers renamed it."""
    parameters = inspect.signature(module.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def feed(module: Any, ids: Tensor, cache: Any, **options: Any) -> Any:
    """One forward pass; ``cache`` takes the keys and values of ``ids``."""
    options[_cache_keyword(module)] = cache
    return module(input_ids=ids, use_cache=True, **options)


def new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


@torch.no_grad()
def prefill(model: Any, ids: Tensor, variant: Variant = None) -> Any:
    """Fills a fresh cache with ``ids`` and returns it; no logits are computed."""
    cache = new_cache(model)
    with attended(model, variant):
        feed(model.base_model, ids, cache)
    return cache


@torch.no_grad()
def logits_behind(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Logits ``[B, n, vocab]`` of ``ids``, fed in one dense pass; the cache stays as it was."""
    logits: Tensor = feed(model, ids, cache).logits
    cache.crop(-ids.shape[1])
    return logits


@torch.no_grad()
def decode_logits(
    model: Any, cache: Any, ids: Tensor, variant: Variant = None, advance: Advance = silent
) -> Tensor:
    """Logits ``[B, n, vocab]`` of ``ids``, fed singly; the cache stays as it was."""
    rows = []
    with attended(model, variant):
        for token in ids.split(1, dim=1):
            rows.append(feed(model, token, cache).logits[:, -1])
            advance(1 / ids.shape[1])
    cache.crop(-ids.shape[1])
    return torch.stack(rows, 1)


@torch.no_grad()
def greedy_tokens(
    model: Any,
    ids: Tensor,
    new_tokens: int,
    variant: Variant = None,
    *,
    prefill_chunk: int | None = None,
    cache: Any = None,
    advance: Advance = silent,
) -> Tensor:
    """The greedy continuation: prefill and every decoding step through ``variant``.

    Args:
        model: a causal LM in eval mode.
        ids: ``[B, n]``, the prompts, or what follows the prompts' beginning in ``cache``.
        new_tokens: tokens to generate; an end-of-text token does not end it.
        variant: what the attention layers run.
        prefill_chunk: tokens prefilled at a time, by default all of them at once.
        cache: keys and values of ``B`` beginnings; they are continued in place.
        advance: told the progress.

    Returns:
        ``[B, new_tokens]`` int64.
    """
    cache = new_cache(model) if cache is None else cache
    tokens: list[Tensor] = []
    with attended(model, variant):
        for part in ids.split(prefill_chunk or ids.shape[1], dim=1):
            output = feed(model, part, cache, logits_to_keep=1)
        for _ in range(new_tokens):
            if tokens:
                output = feed(model, tokens[-1], cache)
            tokens.append(output.logits[:, -1:].argmax(-1))
            advance(1 / new_tokens)
    return torch.cat(tokens, 1)
