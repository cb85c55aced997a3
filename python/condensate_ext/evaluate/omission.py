"""How much softmax mass a policy leaves out on a real text, and what that does to each layer.

One dense pass; at every layer its queries, keys and values also go through the policies, so no
layer sees another layer's error. Rows are sampled, so that the mean has a confidence interval: of
these texts' rows, not of texts that might have been chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condensate_ext.audit import mean_interval
from condensate_ext.diagnostics import last_plan
from condensate_ext.evaluate.policies import Policy, condenses, of_prompts
from condensate_ext.evaluate.runs import Advance, silent
from condensate_ext.evaluate.support import attended_lse
from condensate_ext.ops import attention_forward
from condensate_ext.states import omitted_mass
from condensate_ext.transformers import replaced_attention

AUDITED_ROWS = 256  # a document
AUDITED_STEPS = 24  # a document; each takes calls of its own
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Audit:
    """One policy on one document or several, on the CPU, float32."""

    omitted: (
        Tensor  # [layers, heads, rows]: share of the softmax outside the attended keys, audited
    )
    estimate: Tensor  # [layers, heads, rows]: the same as attention_forward estimates it
    output_error: Tensor  # [documents, layers]: norm of the difference to dense output, relative
    population: int  # rows that the audited ones were drawn from


def _last_half(tokens: int) -> int:
    return tokens - tokens // 2


def audited_rows(tokens: int, documents: int = 1, count: int = AUDITED_ROWS) -> list[Tensor]:
    """Positions to audit in each document, in the last half: early ones leave little out.

    ``count`` a document on average: they are drawn uniformly without replacement from the last
    halves of all documents together, the same ones in every run.
    """
    half = _last_half(tokens)
    shuffled = torch.randperm(documents * half, generator=torch.Generator().manual_seed(0))
    drawn = shuffled[: documents * min(count, half)].sort().values
    return [tokens // 2 + drawn[drawn // half == d] % half for d in range(documents)]


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None
) -> Tensor:
    """Causal attention of a whole prompt by torch's fastest kernel; shapes as ``attention``."""
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    )


def _measured(
    query: Tensor, key: Tensor, value: Tensor, policy: Policy, rows: Tensor, scale: float | None
) -> list[Tensor]:
    """Of some rows: output ``[heads, rows, D]``, omitted mass, its estimate ``[heads, rows]``."""
    out, lse, estimate = attention_forward(
        query, key, value, scale=scale, **of_prompts(policy)
    )
    if (
        condenses(policy) and not last_plan().attends_all
    ):  # its log-sum-exp holds the pools, which are not attended
        lse = attended_lse(query, key, value, policy, scale=scale)
    omitted = omitted_mass(query, key, lse, rows=rows, scale=scale)
    return [out[0, :, rows].float(), omitted[0], estimate[0, :, rows]]


def _measured_alone(
    query: Tensor, key: Tensor, value: Tensor, policy: Policy, rows: Tensor, scale: float | None
) -> list[Tensor]:
    """The same, each row in a call of its own, over the keys up to it, as decoding would."""
    only = torch.zeros(1, dtype=torch.int64, device=query.device)
    steps = []
    for p in rows.tolist():
        keys, values = key[:, :, : p + 1], value[:, :, : p + 1]
        steps.append(_measured(query[:, :, p : p + 1], keys, values, policy, only, scale))
    return [torch.cat(parts, 1) for parts in zip(*steps, strict=True)]


class _Auditor:
    """Stands in for every layer's attention, computes it densely and the policies beside it."""

    def __init__(
        self,
        policies: Sequence[Policy],
        rows: Tensor,
        layers: int,
        alone: bool,
        advance: Advance,
    ) -> None:
        self.policies, self.rows, self.layers, self.advance = policies, rows, layers, advance
        self.measured = _measured_alone if alone else _measured
        self.omitted: list[list[Tensor]] = [[] for _ in policies]  # per layer [heads, rows]
        self.estimate: list[list[Tensor]] = [[] for _ in policies]
        self.error: list[list[Tensor]] = [[] for _ in policies]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
        dense = dense_attention(query, key, value, scale=scale)
        expected = dense[0, :, self.rows].float()
        for number, policy in enumerate(self.policies):
            out, omitted, estimate = self.measured(query, key, value, policy, self.rows, scale)
            self.omitted[number].append(omitted)
            self.estimate[number].append(estimate)
            self.error[number].append((out - expected).norm() / expected.norm())
        self.advance(1 / self.layers)
        return dense

    def result(self, number: int, population: int) -> Audit:
        return Audit(
            torch.stack(self.omitted[number]).cpu(),
            torch.stack(self.estimate[number]).cpu(),
            torch.stack(self.error[number])[None].cpu(),
            population,
        )


@torch.no_grad()
def audit(
    model: Any,
    ids: Tensor,
    policies: Sequence[Policy],
    rows: Tensor | None = None,
    advance: Advance = silent,
    *,
    alone: bool = False,
) -> list[Audit]:
    """Audits every policy on every layer of one text ``[1, n]``.

    ``rows`` are positions in its last half, by default those of :func:`audited_rows`. They are rows
    of a prefill, or each ``alone``, as if it were decoded.
    """
    tokens = ids.shape[1]
    rows = audited_rows(tokens)[0] if rows is None else rows
    layers = model.config.get_text_config().num_hidden_layers
    auditor = _Auditor(policies, rows.to(ids.device), layers, alone, advance)
    with replaced_attention(model, auditor):
        model.base_model(input_ids=ids, use_cache=False)
    return [auditor.result(number, _last_half(tokens)) for number in range(len(policies))]


def joined(audits: Sequence[Audit]) -> Audit:
    """The audits of several documents as one."""
    return Audit(
        torch.cat([a.omitted for a in audits], -1),
        torch.cat([a.estimate for a in audits], -1),
        torch.cat([a.output_error for a in audits]),
        sum(a.population for a in audits),
    )


def _statistics(omitted: Tensor, estimate: Tensor, population: int) -> dict[str, float]:
    # Layers and heads share the rows, so a row is one draw: of its mean over them.
    by_row = omitted.double().reshape(-1, omitted.shape[-1]).mean(0)
    mean, low, high = mean_interval(by_row, population, CONFIDENCE)
    omitted, estimate = omitted.flatten().double(), estimate.flatten().double()
    # torch.quantile takes at most 2^24 elements; the k-th value has no such limit.
    p99 = omitted.kthvalue(max(1, round(0.99 * omitted.numel()))).values
    return {
        "omitted_mean": mean.item(),
        "omitted_low": low.item(),
        "omitted_high": high.item(),
        "omitted_p99": p99.item(),
        "omitted_max": omitted.max().item(),
        "estimate_mean": estimate.mean().item(),
        "estimate_error": (estimate - omitted).abs().mean().item(),
    }


def summary(audited: Audit) -> dict[str, float]:
    """Over all layers, heads and rows; ``estimate_error`` is the mean absolute one.

    ``omitted_low`` to ``omitted_high`` holds the mean over all rows of the last halves, of which
    the audited ones are a sample, with 95 % confidence.
    """
    error = audited.output_error.mean().item()
    found = _statistics(audited.omitted, audited.estimate, audited.population)
    return {**found, "output_error": error}


def by_layer_and_head(audited: Audit) -> list[dict[str, Any]]:
    """One entry a layer, with its output error and the mass that each of its heads leaves out.

    The 95 % are those of each head's interval by itself.
    """
    return [
        {
            "layer": layer,
            "output_error": audited.output_error[:, layer].mean().item(),
            "heads": [
                {"head": head, **_statistics(*rows, audited.population)}
                for head, rows in enumerate(zip(omitted, estimate, strict=True))
            ],
        }
        for layer, (omitted, estimate) in enumerate(
            zip(audited.omitted, audited.estimate, strict=True)
        )
    ]


@torch.no_grad()
def capture_layer(model: Any, ids: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value ``[1, heads, n, D]`` of one layer in a dense pass over ``[1, n]``."""
    layers = itertools.count()
    captured: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
        if next(layers) == layer:
            captured.append((query, key, value))
        return dense_attention(query, key, value, scale=scale)

    with replaced_attention(model, keep):
        model.base_model(input_ids=ids, use_cache=False)
    if not captured:
        raise ValueError(f"layer: the model has {next(layers)} layers, none is number {layer}")
    return captured[0]
