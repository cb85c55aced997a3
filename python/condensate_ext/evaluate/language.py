"""Next-token distributions against dense attention, by three protocols.

:func:`compare_decode`  dense prefill, then one query at a time through the policy: no list can
    depend on a later token.
:func:`compare_cache`   prefill through the policy, then a dense pass over its cache: what sparse
    prefill does to what comes after it.
:func:`compare_prefill` the whole text in one prefill. A tile of queries shares one list, so a row's
    list can depend on later queries of its tile.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condensate_ext.evaluate.intervals import mean_interval
from condensate_ext.evaluate.policies import Policy, Variant
from condensate_ext.evaluate.runs import (
    Advance,
    attended,
    decode_logits,
    logits_behind,
    prefill,
    share_of,
    silent,
)

_CHUNK = 1024  # tokens whose logits are held at once: logits of a whole prompt would be gigabytes


@dataclass(frozen=True)
class Fidelity:
    """One document: averages over ``tokens`` positions, in nats."""

    kl: float  # KL(dense || ours)
    top1: float  # share of positions with the same most likely token
    nll_dense: float  # of the text's next token
    nll: float
    tokens: int

    @property
    def dppl_percent(self) -> float:
        """Change of perplexity."""
        return 100 * math.expm1(self.nll - self.nll_dense)

    @property
    def ppl_dense(self) -> float:
        return math.exp(self.nll_dense)


def summary(documents: Sequence[Fidelity]) -> dict[str, float | int | None]:
    """Averages over all tokens, and the perplexity change of the median and the worst document.

    ``dppl_percent_low`` to ``dppl_percent_high`` is the 95 % interval of the change over documents
    like these, by how much theirs differ; None for one document.
    """
    tokens = sum(d.tokens for d in documents)

    def mean(values: Iterator[float]) -> float:
        return sum(v * d.tokens for v, d in zip(values, documents, strict=True)) / tokens

    interval = mean_interval([d.nll - d.nll_dense for d in documents])
    low, high = (None, None) if interval is None else (100 * math.expm1(x) for x in interval)
    return {
        "kl": mean(d.kl for d in documents),
        "top1": mean(d.top1 for d in documents),
        "dppl_percent": 100 * math.expm1(mean(d.nll - d.nll_dense for d in documents)),
        "dppl_percent_low": low,
        "dppl_percent_high": high,
        "dppl_percent_median": statistics.median(d.dppl_percent for d in documents),
        "dppl_percent_worst": max(d.dppl_percent for d in documents),
        "documents": len(documents),
        "tokens": tokens,
    }


class _Comparison:
    """Sums up positions, on the device and in float64, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, dense_logits: Tensor, logits: Tensor, targets: Tensor) -> None:
        """``[n, vocab]`` twice, and the ids ``[n]`` that the text goes on with."""
        dense = dense_logits.float().log_softmax(-1)
        ours = logits.float().log_softmax(-1)
        rows = [
            (dense.exp() * (dense - ours)).sum(-1),
            (dense.argmax(-1) == ours.argmax(-1)).float(),
            -dense.gather(-1, targets[:, None])[:, 0],
            -ours.gather(-1, targets[:, None])[:, 0],
        ]
        self.sums += torch.stack(rows).double().sum(-1)
        self.tokens += len(targets)

    def result(self) -> Fidelity:
        kl, top1, nll_dense, nll = (self.sums / max(self.tokens, 1)).tolist()
        return Fidelity(kl, top1, nll_dense, nll, self.tokens)


def _compare(dense: Tensor, ours: Tensor, targets: Tensor) -> list[Fidelity]:
    """Logits ``[B, n, vocab]`` and targets ``[B, n]``: one result a document."""
    results = []
    for rows in zip(dense, ours, targets, strict=True):
        comparison = _Comparison(dense.device)
        comparison.add(*rows)
        results.append(comparison.result())
    return results


def _split(ids: Tensor, decode_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The context, the tokens behind it that are fed, and the ids that they should predict."""
    context = ids.shape[1] - decode_tokens - 1
    if context < 1:
        raise ValueError(
            f"ids has {ids.shape[1]} tokens; decode_tokens={decode_tokens} needs at least "
            f"{decode_tokens + 2}: pass a longer text or decode fewer tokens."
        )
    return ids[:, :context], ids[:, context:-1], ids[:, context + 1 :]


def compare_decode(
    model: Any,
    ids: Tensor,
    variants: Sequence[Variant],
    decode_tokens: int = 512,
    advance: Advance = silent,
) -> list[list[Fidelity]]:
    """Dense prefill of all but the last ``decode_tokens`` tokens, then one query at a time.

    Each of the last tokens is fed alone through the variant, in every layer, over a cache that its
    predecessors filled under the same variant, and compared with dense decoding.

    Args:
        model: a causal LM in eval mode.
        ids: ``[B, n]`` int64, ``B`` documents; the last id is only predicted.
        variants: what is compared with dense attention.
        decode_tokens: tokens compared in each document.
        advance: told the progress.

    Returns:
        For each variant, one result a document.
    """
    context, inputs, targets = _split(ids, decode_tokens)
    part = share_of(advance, 1 + len(variants))
    cache = prefill(model, context)
    dense = decode_logits(model, cache, inputs, None, part)
    return [
        _compare(dense, decode_logits(model, cache, inputs, variant, part), targets)
        for variant in variants
    ]


def compare_cache(
    model: Any,
    ids: Tensor,
    variants: Sequence[Variant],
    decode_tokens: int = 512,
    advance: Advance = silent,
) -> list[list[Fidelity]]:
    """All but the last ``decode_tokens`` tokens through the variant, those densely over its cache.

    Arguments and result: as for :func:`compare_decode`.
    """
    context, inputs, targets = _split(ids, decode_tokens)

    def tail(variant: Variant) -> Tensor:
        logits = logits_behind(model, prefill(model, context, variant), inputs)
        advance(1 / (1 + len(variants)))
        return logits

    dense = tail(None)
    return [_compare(dense, tail(variant), targets) for variant in variants]


@torch.no_grad()
def compare_prefill(model: Any, ids: Tensor, policy: Policy) -> Fidelity:
    """The text ``[1, n]`` in one prefill, dense and condensed; every next token is compared."""
    hidden = []
    for applied in (None, policy):
        with attended(model, applied):
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        hidden.append(states[0, :-1])
    head = model.get_output_embeddings()
    comparison = _Comparison(ids.device)
    for begin in range(0, len(hidden[0]), _CHUNK):
        rows = slice(begin, begin + _CHUNK)
        comparison.add(head(hidden[0][rows]), head(hidden[1][rows]), ids[0, 1:][rows])
    return comparison.result()
