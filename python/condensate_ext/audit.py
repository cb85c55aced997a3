"""The audit of omitted softmax mass, of all rows or of a sample with a confidence interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from condensate_ext.states import omitted_mass

_KAPPA = 7 / 3 + 3 / math.sqrt(2)  # of the empirical Bernstein-Serfling inequality


@dataclass(frozen=True)
class OmittedMassAudit:
    """What :func:`audit_omitted_mass` found, on the query's device; shares of 0 to 1."""

    rows: Tensor  # [R] int64, ascending: the audited queries
    omitted_mass: Tensor  # [B, Hq, R] float32: what each of them leaves out
    mean: Tensor  # [B, Hq] float64: the rows' mean, an estimate of that over all Lq queries
    lower: Tensor  # [B, Hq] float64: the confidence interval of the mean over all Lq queries
    upper: Tensor


def audit_omitted_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    sample: int | None = None,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> OmittedMassAudit:
    """Measures the mean softmax mass that an attention left out, exactly or from a sample of rows.

    Every audited row scores all keys that it sees, by :func:`condensate_ext.omitted_mass`. A sample
    is drawn uniformly without replacement, one for all batches and heads. The interval holds for
    samples of any size and for any content: ``mean ± h``, within [0, 1], ``h`` the smaller of

    * Hoeffding-Serfling ``sqrt(r * log(4/a) / (2 R))``,
    * empirical Bernstein-Serfling ``s * sqrt(2 r * log(20/a) / R) + k * log(20/a) / R``,

    where ``a = 1 - confidence``, half of it for either, ``s`` is the standard deviation of the
    sample (divisor ``R``), ``k = 7/3 + 3/sqrt(2)``, and ``r``, which falls to 0 at ``R = Lq``, the
    smaller of ``1 - (R - 1)/Lq`` and ``(1 - R/Lq) * (1 + 1/R)``. Source: Bardenet and Maillard,
    *Concentration inequalities for sampling without replacement*, Bernoulli 21 (2015),
    https://arxiv.org/abs/1309.4029, corollary 2.5 and theorem 4.3, on either side. At 0.95 a small
    part of many rows gives ``h = 0.093`` for 256 and at most 0.047 for 1,000; beyond, the second
    counts more the more alike the rows are.

    The interval is that of one head of one batch: each holds with probability ``confidence`` of
    itself, not all at once. For ``m`` of them at once pass ``1 - (1 - confidence) / m``.

    Args:
        query: ``[B, Hq, Lq, D]``.
        key: ``[B, Hkv, Lk, D]``.
        lse: ``[B, Hq, Lq]`` float32, contiguous: the log-sum-exp that the attention returned with
            ``far_field=False``. With far field it holds the condensed keys too.
        sample: ``R``, the rows to audit, ``2 <= R <= Lq``; None for all of them.
        confidence: the probability, in (0, 1), with which an interval holds at least.
        generator: draws the rows, on the query's device; None for torch's default one. Equal states
            draw equal rows.
        causal: as in the audited call.
        scale: as in the audited call.

    Returns:
        An :class:`OmittedMassAudit`. Rows that see no key count as 0. Where all rows are audited
        ``lower``, ``mean`` and ``upper`` are equal; without queries they are NaN.

    Raises:
        ValueError: an argument is invalid.
        RuntimeError: an input requires grad, ``generator`` is on another device, or this build or
            device cannot run the call.
    """
    queries = query.shape[-2]
    _check(sample, queries, confidence)
    if sample is None:
        rows = torch.arange(queries, device=query.device)
    else:
        shuffled = torch.randperm(queries, generator=generator, device=query.device)
        rows = shuffled[:sample].sort().values
    omitted = omitted_mass(query, key, lse, rows=rows, causal=causal, scale=scale)
    return OmittedMassAudit(rows, omitted, *mean_interval(omitted, queries, confidence))


def _check(sample: int | None, queries: int, confidence: float) -> None:
    if sample is not None and not 2 <= sample <= queries:
        raise ValueError(
            f"audit_omitted_mass: sample is {sample}, expected 2 <= sample <= {queries}, the "
            "queries; pass None to audit all of them."
        )
    if not 0 < confidence < 1:
        raise ValueError(
            f"audit_omitted_mass: confidence is {confidence}, expected a probability between 0 and "
            "1, both excluded; pass 0.95, or None as sample for exact means."
        )


def mean_interval(
    values: Tensor, population: int, confidence: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, lower and upper bound of the mean of a population in [0, 1], float64.

    ``values`` ``[..., n]`` are ``n`` of its members, drawn uniformly without replacement;
    :func:`audit_omitted_mass` has the formula.
    """
    values = values.double()
    n = values.shape[-1]
    mean = values.mean(-1)
    if n == population:
        return mean, mean, mean
    unseen = min(1 - (n - 1) / population, (1 - n / population) * (1 + 1 / n))
    miss = 1 - confidence
    hoeffding = math.sqrt(unseen * math.log(4 / miss) / (2 * n))
    deviation = values.std(-1, correction=0)
    bernstein = deviation * math.sqrt(2 * unseen * math.log(20 / miss) / n)
    half = (bernstein + _KAPPA * math.log(20 / miss) / n).clamp(max=hoeffding)
    return mean, (mean - half).clamp(min=0), (mean + half).clamp(max=1)
