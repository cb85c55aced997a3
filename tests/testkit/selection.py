"""Oracles of selection: summaries, block masses, lists, token top-k. All in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.testkit import oracle
from tests.testkit.definition import (
    BLOCK_KEYS,
    UNIT_KEYS,
    Ranges,
    ceil_div,
    query_pool,
    tile_positions,
)

# Masses below this are one: float32 may have flushed them to 0.
TINY_MASS = 1e-30


def units(key: Tensor, selector: str) -> Tensor:
    """Float64 summaries [B, Hkv, U, Ds], not rounded; units with no key are 0."""
    b, h, lk, d = key.shape
    size = UNIT_KEYS[selector]
    count = ceil_div(lk, BLOCK_KEYS) * (BLOCK_KEYS // size)
    summary_dim = 2 * d if selector == "quest" else d
    result = torch.zeros(b, h, count, summary_dim, dtype=torch.float64, device=key.device)
    for unit in range(ceil_div(lk, size)):
        keys = key[:, :, unit * size : (unit + 1) * size].double()
        parts = [keys.amax(2), keys.amin(2)] if selector == "quest" else [keys.mean(2)]
        result[:, :, unit] = torch.cat(parts, -1)
    return result


def _runs(rows: Tensor, size: int) -> Tensor:
    """[B, H, S, X] -> [B, H, ceil(S / size), size, X]: runs of consecutive rows, filled with 0."""
    count = ceil_div(rows.shape[2], size)
    filled = pad(rows, (0, 0, 0, count * size - rows.shape[2]))
    return filled.unflatten(2, (count, size))


def pooled_queries(query: Tensor, group: int) -> Tensor:
    """Means over the positions of each pool, in float32, rounded to the query's dtype."""
    runs = _runs(query.float(), query_pool(group))
    exists = _runs(torch.ones_like(query[:1, :1, :, :1], dtype=torch.float32), query_pool(group))
    return (runs.sum(3) / exists.sum(3)).to(query.dtype)


@dataclass(frozen=True)
class Masses:
    per_pool: Tensor  # [B, Hq, pools, blocks] float64
    per_tile: Tensor  # [B, Hkv, T, blocks]: the largest over the tile's pools and heads
    tolerance: float  # relative error that a float32 computation of a mass may have


def masses(
    query: Tensor, summaries: Tensor, ranges: Ranges, selector: str, scale: float | None
) -> Masses:
    """Softmax mass of every block by the definition, from summaries as the op returned them."""
    heads, d = query.shape[1], query.shape[-1]
    group = heads // summaries.shape[1]
    factor = oracle.as_float32(oracle.default_scale(d) if scale is None else scale)
    pooled = pooled_queries(query, group).double()
    unit = oracle.expand_heads(summaries, heads)
    if selector == "quest":
        high, low = unit.split(d, -1)
        score = pooled.clamp(min=0) @ high.mT + pooled.clamp(max=0) @ low.mT
        unit = torch.maximum(high.abs(), low.abs())
    else:
        score = pooled @ unit.mT
    score = (factor * score).masked_fill(~_unit_visible(ranges, group, selector), -torch.inf)
    total = torch.logsumexp(score, -1, keepdim=True)
    mass = torch.where(score == -torch.inf, 0.0, (score - total).exp())
    units_per_block = BLOCK_KEYS // UNIT_KEYS[selector]
    mass = mass.unflatten(-1, (mass.shape[-1] // units_per_block, units_per_block)).sum(-1)
    tiled = _runs(mass, tile_positions(group) // query_pool(group)).amax(3)
    tiled = tiled.unflatten(1, (heads // group, group)).amax(2)
    return Masses(mass, tiled, _tolerance(query, pooled, unit, factor))


def _unit_visible(ranges: Ranges, group: int, selector: str) -> Tensor:
    """[pools, units]: is the unit's last key at or before the pool's last query?"""
    size, pool = UNIT_KEYS[selector], query_pool(group)
    first = torch.arange(0, ceil_div(ranges.kv_len, BLOCK_KEYS) * BLOCK_KEYS, size)
    last = (first + size).clamp(max=ranges.kv_len) - 1
    ends = [min(p + pool, ranges.query_len) - 1 for p in range(0, ranges.query_len, pool)]
    position = torch.tensor(ends)[:, None] + ranges.kv_len - ranges.query_len
    seen = (first < ranges.kv_len) & (torch.ones_like(position, dtype=torch.bool))
    seen = seen & (last <= position) if ranges.causal else seen
    return seen.to(ranges.device)


def _tolerance(query: Tensor, pooled: Tensor, unit: Tensor, factor: float) -> float:
    """Error of a score: float32 accumulation, and a pooled query that rounds the other way."""
    if not pooled.numel() or not unit.numel():
        return 0.0
    q_max, k_max = pooled.abs().amax((0, 1, 2)), unit.abs().amax((0, 1, 2))
    size = abs(factor) * float((q_max * k_max).sum())
    flip = abs(factor) * float((q_max * k_max).max())
    flipped = 0.0 if query.dtype == torch.float32 else 4 * oracle.UNIT_ROUNDOFF[query.dtype] * flip
    return 2 * (2 * (query.shape[-1] + 4) * oracle.EPS * size + flipped) + 1e-5


def check_summaries(key: Tensor, summaries: Tensor, selector: str) -> None:
    """Means within rounding of float64, extrema exact, empty units exactly 0."""
    expected = units(key, selector)
    assert summaries.shape == expected.shape and summaries.dtype == key.dtype
    assert summaries.is_contiguous()
    if selector == "quest":
        assert torch.equal(summaries.double(), expected)
        return
    mean_size = units(key.abs(), selector)
    bound = oracle.UNIT_ROUNDOFF[key.dtype] * expected.abs() + 80 * oracle.EPS * mean_size
    bound += 2.0**-25 if key.dtype == torch.float16 else 0.0  # half a subnormal step
    bound = torch.where(mean_size == 0, 0.0, bound)
    assert ((summaries.double() - expected).abs() <= bound).all()


def check_lists(
    indices: Tensor, counts: Tensor, mass: Masses, eligible: Tensor, budget: int, hint: str = ""
) -> Tensor:
    """A valid top-`budget` by mass: right form, nothing clearly heavier left out.

    Returns the chosen blocks, bool [B, Hkv, T, blocks].
    """
    chosen = check_form(indices, counts, eligible, budget, hint)
    heavy = mass.per_tile.clamp(min=TINY_MASS).masked_fill(~eligible, 0.0)
    if budget and heavy.shape[-1] > budget:
        kth = heavy.topk(budget, -1).values[..., -1:]
        band = 1 + mass.tolerance
        missing = eligible & ~chosen & (heavy > kth * band)
        assert not missing.any(), f"a block of clearly larger mass was left out {hint}"
        surplus = chosen & (heavy * band < kth)
        assert not surplus.any(), f"a block of clearly smaller mass was taken {hint}"
    return chosen


def check_form(
    indices: Tensor, counts: Tensor, eligible: Tensor, budget: int, hint: str = ""
) -> Tensor:
    """Counts, order, padding and eligibility of lists; returns bool [B, Hkv, T, blocks]."""
    assert indices.dtype == counts.dtype == torch.int32, hint
    tiles, blocks = eligible.shape
    assert indices.shape == (*counts.shape, budget) and counts.shape[-1] == tiles, hint
    expected = eligible.sum(-1).clamp(max=budget).expand(counts.shape)
    assert torch.equal(counts.long(), expected), f"wrong number of blocks {hint}"
    used = torch.arange(budget, device=indices.device) < counts[..., None]
    assert (indices[~used] == -1).all(), f"lists are not padded with -1 {hint}"
    assert ((indices >= 0) & (indices < blocks))[used].all(), f"block out of range {hint}"
    rising = (indices[..., 1:] > indices[..., :-1]) | ~used[..., 1:]
    assert rising.all(), f"lists do not ascend strictly {hint}"
    slots = torch.where(used, indices, blocks).long()
    chosen = torch.zeros(*counts.shape, blocks + 1, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter_(-1, slots, True)[..., :blocks]
    assert not (chosen & ~eligible).any(), f"a block is listed that is not eligible {hint}"
    return chosen


def expected_lists(mass: Tensor, eligible: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """The one right choice where masses are exact: bool chosen, and bool [...] "is it certain?".

    Masses within 1e-9 of each other are ties (lower index first); a tile in which two masses
    differ by more than that and less than 1e-5 is not certain.
    """
    log_mass = mass.clamp(min=TINY_MASS).log().masked_fill(~eligible, -torch.inf)
    order = log_mass.sort(-1, descending=True)
    gap = (order.values[..., :-1] - order.values[..., 1:]).nan_to_num(0.0)
    certain = ~((gap > 1e-9) & (gap < 1e-5)).any(-1)
    level = torch.cat([torch.zeros_like(log_mass[..., :1]), (gap > 1e-9).double().cumsum(-1)], -1)
    level_of_block = torch.zeros_like(level).scatter_(-1, order.indices, level)
    rank = level_of_block.argsort(dim=-1, stable=True).argsort(dim=-1)
    return (rank < budget) & eligible, certain


def expected_tokens(score: Tensor, candidates: Tensor, topk: int) -> Tensor:
    """bool [B, Hq, Lq, Lk]: the topk best candidates, ties to the lower index, NaN never."""
    usable = candidates & ~score.isnan()
    ranked = score.masked_fill(~usable, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(ranked)
    rank.scatter_(-1, ranked, torch.arange(score.shape[-1], device=score.device).expand_as(rank))
    return usable & (rank < topk)


def estimated_omission(mass: Masses, chosen: Tensor, eligible: Tensor, query_len: int) -> Tensor:
    """omitted_mass_estimate by the definition, [B, Hq, Lq] float64."""
    heads = mass.per_pool.shape[1]
    group = heads // chosen.shape[1]
    kept = (chosen | ~eligible).repeat_interleave(group, 1)
    i = torch.arange(query_len, device=chosen.device)
    per_row = mass.per_pool[:, :, i // query_pool(group)]
    left_out = torch.where(kept[:, :, i // tile_positions(group)], 0.0, per_row)
    return left_out.sum(-1)
