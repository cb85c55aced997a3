"""Free-running generation: how long a greedy continuation stays identical to the dense model's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from condensate_ext.evaluate.policies import Variant
from condensate_ext.evaluate.runs import Advance, greedy_tokens, share_of, silent


def identical_prefix(reference: Tensor, tokens: Tensor) -> list[int]:
    """Tokens before the first difference, for every row of two ``[P, n]``."""
    return [int(n) for n in (reference == tokens).cumprod(1).sum(1)]


def compare_continuations(
    model: Any,
    ids: Tensor,
    variants: Sequence[Variant],
    new_tokens: int = 128,
    *,
    prefill_chunk: int | None = None,
    advance: Advance = silent,
) -> list[list[int]]:
    """Continues every prompt greedily, densely and through each variant, and compares.

    Args:
        model: a causal LM in eval mode.
        ids: ``[P, n]`` int64, prompts of equal length.
        variants: what is compared with dense attention; prefill and every step go through it.
        new_tokens: tokens of a continuation.
        prefill_chunk: tokens prefilled at a time, by default all of them at once.
        advance: told the progress.

    Returns:
        For each variant and prompt, the tokens before the first that differs from the dense one.
    """
    part = share_of(advance, 1 + len(variants))

    def run(variant: Variant) -> Tensor:
        return greedy_tokens(
            model, ids, new_tokens, variant, prefill_chunk=prefill_chunk, advance=part
        )

    dense = run(None)
    return [identical_prefix(dense, run(variant)) for variant in variants]


def summary(identical: Sequence[int], new_tokens: int) -> dict[str, float | int]:
    """Mean and median tokens before the first difference; the share of prompts without any."""
    return {
        "identical_tokens": statistics.fmean(identical),
        "identical_tokens_median": statistics.median(identical),
        "survived": statistics.fmean(n == new_tokens for n in identical),
        "documents": len(identical),
        "tokens": len(identical) * new_tokens,
    }
