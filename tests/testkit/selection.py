"""Oracles of selection: summaries, block masses, lists, token top-k. All in float64.

Where a kernel's rounding may decide, the oracle knows intervals: blocks that are surely on the
shortlist and ones that may be, masses from the least to the most that a kernel may find.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.testkit import oracle
from tests.testkit.definition import (
    BLOCK_KEYS,
    COARSE,
    FINE,
    LEVELS,
    MIDDLE,
    REFINEMENT_POOL,
    SCAN_POOL,
    Ranges,
    ceil_div,
    pool_size,
    scan_tiles,
    spread_to_rows,
    tile_positions,
)

# Masses below this are one: float32 may have flushed them to 0.
TINY_MASS = 1e-30
LARGEST_MASS = float(torch.finfo(torch.float32).max)
# Relative error of a sum of exponentials beside that of the scores: the exponentials' own, 64 terms
# one after another, and a running sum that is rescaled.
SUM_ERROR = 160 * oracle.EPS


# ---- Summaries ----


def units(key: Tensor, selector: str) -> Tensor:
    """Float64 summaries [B, Hkv, rows, Ds], not rounded; units with no key are 0."""
    levels = [_units_of(key, selector, size) for size in LEVELS[selector]]
    return torch.cat(levels, 3).flatten(2, 3)


def _units_of(key: Tensor, selector: str, size: int) -> Tensor:
    """The units of one size, [B, Hkv, blocks, units of a block, Ds]."""
    b, h, lk, d = key.shape
    blocks, per_block = ceil_div(lk, BLOCK_KEYS), BLOCK_KEYS // size
    summary_dim = 2 * d if selector == "quest" else d
    result = torch.zeros(b, h, blocks * per_block, summary_dim, dtype=torch.float64)
    result = result.to(key.device)
    for unit in range(ceil_div(lk, size)):
        keys = key[:, :, unit * size : (unit + 1) * size].double()
        parts = [keys.amax(2), keys.amin(2)] if selector == "quest" else [keys.mean(2)]
        result[:, :, unit] = torch.cat(parts, -1)
    return result.unflatten(2, (blocks, per_block))


def level_of(summaries: Tensor, selector: str, size: int) -> Tensor:
    """[B, Hkv, units, Ds]: the rows that hold the units of one size."""
    counts = [BLOCK_KEYS // keys for keys in LEVELS[selector]]
    first = sum(counts[: LEVELS[selector].index(size)])
    blocks = summaries.unflatten(2, (summaries.shape[2] // sum(counts), sum(counts)))
    return blocks[:, :, :, first : first + BLOCK_KEYS // size].flatten(2, 3)


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


# ---- Scores ----


def _runs(rows: Tensor, size: int) -> Tensor:
    """[B, H, S, X] -> [B, H, ceil(S / size), size, X]: runs of consecutive rows, filled with 0."""
    count = ceil_div(rows.shape[2], size)
    filled = pad(rows, (0, 0, 0, count * size - rows.shape[2]))
    return filled.unflatten(2, (count, size))


def pooled_queries(query: Tensor, pool: int) -> Tensor:
    """Means over the positions of each pool, in float32, rounded to the query's dtype."""
    runs = _runs(query.float(), pool)
    exists = _runs(torch.ones_like(query[:1, :1, :, :1], dtype=torch.float32), pool)
    return (runs.sum(3) / exists.sum(3)).to(query.dtype)


@dataclass(frozen=True)
class LogSums:
    """Of some queries' scores against the units of one size."""

    by_block: Tensor  # [B, Hq, rows, blocks]: log of the sum of exp over the visible units
    largest: Tensor  # the same: the largest score of a visible unit; NaN is none
    error: float  # relative, that a float32 computation of such a sum may have


def masses(part: Tensor, whole: LogSums, counted: Tensor | None = None) -> Tensor:
    """[B, Hq, rows, blocks]: exp(part) over the sum of `whole` over the counted blocks."""
    terms = whole.by_block
    if counted is not None:
        terms = terms.masked_fill(~counted, -torch.inf)
    norm = torch.logsumexp(terms, -1, keepdim=True)
    mass = (part - norm).exp().nan_to_num(nan=0.0).clamp(max=LARGEST_MASS)
    return torch.where(norm.isfinite(), mass, 0.0)


class Scores:
    """What the definition says about the lists of one call, from the summaries of the op."""

    def __init__(
        self,
        query: Tensor,
        summaries: Tensor,
        ranges: Ranges,
        selector: str,
        scale: float | None,
        *,
        exact: bool = False,
    ) -> None:
        """`exact`: means and scores are small integers times powers of two, free of rounding."""
        self.query, self.summaries, self.ranges = query, summaries, ranges
        self.selector, self.exact = selector, exact
        self.heads, d = query.shape[1], query.shape[-1]
        self.group = self.heads // summaries.shape[1]
        self.factor = oracle.as_float32(oracle.default_scale(d) if scale is None else scale)
        self.eligible = ranges.eligible(self.group)
        self.beside = ranges.beside(self.group)
        self.joined = scan_tiles(ranges.kv_len) if selector == "block" else 1
        self.scan_pool = self.joined * pool_size(self.group, SCAN_POOL)
        self.refinement_pool = pool_size(self.group, REFINEMENT_POOL)

    # What scan tiles [S, blocks] and tiles [T, blocks] have in common.

    @property
    def scan_eligible(self) -> Tensor:
        return self._any_of_joined(self.eligible)

    @property
    def scan_beside(self) -> Tensor:
        return self._any_of_joined(self.beside)

    def _any_of_joined(self, of_tiles: Tensor) -> Tensor:
        filled = pad(of_tiles, (0, 0, 0, -of_tiles.shape[0] % self.joined))
        return filled.unflatten(0, (-1, self.joined)).any(1)

    def to_tiles(self, of_scan_tiles: Tensor) -> Tensor:
        """[..., S, blocks] -> [..., T, blocks]"""
        return of_scan_tiles.repeat_interleave(self.joined, -2)[..., : self.eligible.shape[0], :]

    # Sums of every kind of query against every size of unit that the definition names.

    @cached_property
    def scan_part(self) -> LogSums:
        size = MIDDLE if self.selector == "block" else LEVELS[self.selector][0]
        return self._log_sums(size, self.scan_pool)

    @cached_property
    def scan_whole(self) -> LogSums:
        if self.selector != "block":
            return self.scan_part
        return self._log_sums(COARSE, self.scan_pool)

    @cached_property
    def fine(self) -> LogSums:
        return self._log_sums(FINE, self.refinement_pool)

    @cached_property
    def middle(self) -> LogSums:
        return self._log_sums(MIDDLE, self.refinement_pool)

    def _log_sums(self, size: int, pool: int) -> LogSums:
        d = self.query.shape[-1]
        rows = pooled_queries(self.query, pool).double()
        unit = oracle.expand_heads(level_of(self.summaries, self.selector, size), self.heads)
        if self.selector == "quest":
            high, low = unit.split(d, -1)
            score = rows.clamp(min=0) @ high.mT + rows.clamp(max=0) @ low.mT
            unit = torch.maximum(high.abs(), low.abs())
        else:
            score = rows @ unit.mT
        score = (self.factor * score).masked_fill(~self._visible(size, pool), -torch.inf)
        per_block = BLOCK_KEYS // size
        by_block = score.unflatten(-1, (score.shape[-1] // per_block, per_block))
        largest = by_block.masked_fill(by_block.isnan(), -torch.inf).amax(-1)
        return LogSums(torch.logsumexp(by_block, -1), largest, self._error(rows, unit, pool))

    def _visible(self, size: int, pool: int) -> Tensor:
        """[rows, units]: is the unit's last key at or before the row's last query?"""
        r = self.ranges
        first = torch.arange(0, ceil_div(r.kv_len, BLOCK_KEYS) * BLOCK_KEYS, size)
        last = (first + size).clamp(max=r.kv_len) - 1
        ends = torch.arange(pool, r.query_len + pool, pool).clamp(max=r.query_len) - 1
        position = ends[:, None] + r.kv_len - r.query_len
        seen = (first < r.kv_len) & torch.ones_like(position, dtype=torch.bool)
        seen = seen & (last <= position) if r.causal else seen
        return seen.to(r.device)

    def _error(self, rows: Tensor, unit: Tensor, pool: int) -> float:
        """Accumulation in float32, also of pools, rounding of the exponential's argument, and
        pooled queries that round the other way."""
        if not rows.numel() or not unit.numel():
            return 0.0
        rows, unit = (t.abs().nan_to_num(posinf=0.0) for t in (rows, unit))
        size = abs(self.factor) * float((rows @ unit.mT).amax())
        if self.exact:
            return 4 * oracle.EPS * size + SUM_ERROR
        summed = pooled_queries(self.query.abs().nan_to_num(posinf=0.0), pool).double()
        pooling = pool * oracle.EPS * abs(self.factor) * float((summed @ unit.mT).amax())
        flip = 0.0
        if self.query.dtype != torch.float32:
            largest = float((rows.amax((0, 1, 2)) * unit.amax((0, 1, 2))).max())
            flip = 4 * oracle.UNIT_ROUNDOFF[self.query.dtype] * abs(self.factor) * largest
        return (2 * (rows.shape[-1] + 4) + 4) * oracle.EPS * size + pooling + flip + SUM_ERROR

    # Masses of tiles: [B, Hkv, T, blocks], or of scan tiles.

    def _of_tiles(self, per_pool: Tensor, pools: int) -> Tensor:
        tiled = _runs(per_pool, pools).amax(3)
        return tiled.unflatten(1, (self.heads // self.group, self.group)).amax(2)

    @cached_property
    def scanned(self) -> Tensor:
        """Masses of the scan: of the hottest units, for scan tiles."""
        pools = self.joined * tile_positions(self.group) // self.scan_pool
        return self._of_tiles(masses(self.scan_part.largest, self.scan_whole), pools)

    @property
    def scan_error(self) -> float:
        return self.scan_part.error + self.scan_whole.error

    @property
    def refinement_error(self) -> float:
        return self.fine.error + self.middle.error

    def refined(self, walked: Tensor) -> Tensor:
        """Masses of the refinement when `walked` [B, Hkv, T, blocks] is W."""
        pool = self.refinement_pool
        counted = spread_to_rows(walked, self.heads, self.query.shape[2])[:, :, ::pool]
        per_pool = masses(self.fine.by_block, self.middle, counted)
        return self._of_tiles(per_pool, tile_positions(self.group) // pool)


# ---- Lists ----


def shortlist_width(budget: int) -> int:
    return max(64, 2 * budget)


def top_bounds(mass: Tensor, eligible: Tensor, width: int, error: float) -> tuple[Tensor, Tensor]:
    """Blocks that are surely among the `width` heaviest, and those that may be.

    Every mass may be off by the relative error.
    """
    heavy = mass.clamp(min=TINY_MASS).masked_fill(~eligible, 0.0)
    ranked = pad(heavy, (0, width + 1)).topk(width + 1, -1).values
    band = (1 + error) ** 2
    possible = heavy * band >= ranked[..., width - 1 : width] if width else heavy < 0
    return eligible & (heavy > ranked[..., width:] * band), eligible & possible


def check_lists(scores: Scores, indices: Tensor, counts: Tensor, budget: int) -> Tensor:
    """A right list by the definition, up to rounding; returns the chosen blocks as booleans."""
    chosen = check_form(indices, counts, scores.eligible, budget)
    if scores.selector == "block":
        return _check_two_levels(scores, chosen, budget)
    certain, possible = top_bounds(scores.scanned, scores.eligible, budget, scores.scan_error)
    assert not (certain & ~chosen).any(), "a block of clearly larger mass was left out"
    assert not (chosen & ~possible).any(), "a block of clearly smaller mass was taken"
    return chosen


def _check_two_levels(scores: Scores, chosen: Tensor, budget: int) -> Tensor:
    certain, possible = (
        scores.to_tiles(bound) & scores.eligible for bound in shortlist_bounds(scores, budget)
    )
    assert not (chosen & ~possible).any(), "a block was taken that cannot be on the shortlist"
    one = scores.refined(certain | scores.beside)
    other = scores.refined(possible | scores.beside)
    band = 1 + scores.refinement_error
    least = torch.minimum(one, other).clamp(min=TINY_MASS) / band
    most = torch.maximum(one, other).clamp(min=TINY_MASS) * band
    lightest_taken = torch.where(chosen, most, torch.inf)
    lightest_taken = pad(lightest_taken, (0, 1), value=torch.inf).amin(-1, keepdim=True)
    missing = certain & ~chosen & (least > lightest_taken)
    assert not missing.any(), "a block of the shortlist is clearly heavier than one of the list"
    return chosen


def shortlist_bounds(scores: Scores, budget: int) -> tuple[Tensor, Tensor]:
    """Blocks that are surely on the shortlist of a scan tile, and those that may be."""
    return top_bounds(
        scores.scanned, scores.scan_eligible, shortlist_width(budget), scores.scan_error
    )


def check_form(indices: Tensor, counts: Tensor, eligible: Tensor, budget: int) -> Tensor:
    """Counts, order, padding and eligibility of lists; returns bool [B, Hkv, T, blocks]."""
    assert indices.dtype == counts.dtype == torch.int32
    tiles, blocks = eligible.shape
    assert indices.shape == (*counts.shape, budget) and counts.shape[-1] == tiles
    expected = eligible.sum(-1).clamp(max=budget).expand(counts.shape)
    assert torch.equal(counts.long(), expected), "wrong number of blocks"
    used = torch.arange(budget, device=indices.device) < counts[..., None]
    assert (indices[~used] == -1).all(), "lists are not padded with -1"
    assert ((indices >= 0) & (indices < blocks))[used].all(), "block out of range"
    rising = (indices[..., 1:] > indices[..., :-1]) | ~used[..., 1:]
    assert rising.all(), "lists do not ascend strictly"
    slots = torch.where(used, indices, blocks).long()
    chosen = torch.zeros(*counts.shape, blocks + 1, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter_(-1, slots, True)[..., :blocks]
    assert not (chosen & ~eligible).any(), "a block is listed that is not eligible"
    return chosen


def expected_lists(mass: Tensor, eligible: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """The one right choice where masses are exact: bool chosen, and bool [...] "is it certain?".

    Masses within 1e-9 of each other are ties (lower index first). Ones that differ by more than
    that and less than 1e-5 may come in either order: a tile in which that could carry a block over
    the edge of the list is not certain.
    """
    log_mass = mass.clamp(min=TINY_MASS).log().masked_fill(~eligible, -torch.inf)
    order = log_mass.sort(-1, descending=True)
    gap = (order.values[..., :-1] - order.values[..., 1:]).nan_to_num(0.0)
    level = pad((gap > 1e-9).double().cumsum(-1), (1, 0))
    level_of_block = torch.zeros_like(level).scatter_(-1, order.indices, level)
    rank = level_of_block.argsort(dim=-1, stable=True).argsort(dim=-1)
    certain = torch.ones(mass.shape[:-1], dtype=torch.bool, device=mass.device)
    if 0 < budget < mass.shape[-1]:
        # The gap below the level of the last block inside, and above it if it goes on outside.
        last, first = level[..., budget - 1 : budget], level[..., budget : budget + 1]
        edge = (level[..., :-1] == last) | ((last == first) & (level[..., 1:] == last))
        certain = ~(edge & (gap > 1e-9) & (gap < 1e-5)).any(-1)
    return (rank < budget) & eligible, certain


def expected_choice(scores: Scores, budget: int) -> tuple[Tensor, Tensor]:
    """The one right choice where scores are exact, bool [B, Hkv, T, blocks], and "is it certain?".

    What is certain of a tile is as in expected_lists.
    """
    if scores.selector != "block":
        return expected_lists(scores.scanned, scores.eligible, budget)
    width = shortlist_width(budget)
    shared, certain = expected_lists(scores.scanned, scores.scan_eligible, width)
    certain |= shared.sum(-1) == scores.scan_eligible.sum(-1)
    shortlist = scores.to_tiles(shared) & scores.eligible
    certain = scores.to_tiles(certain[..., None])[..., 0]
    mass = scores.refined(shortlist | scores.beside)
    chosen, certain_list = expected_lists(mass, shortlist, budget)
    fits = scores.eligible.sum(-1) <= budget
    return chosen, (certain & certain_list) | fits


def expected_tokens(score: Tensor, candidates: Tensor, topk: int) -> Tensor:
    """bool [B, Hq, Lq, Lk]: the topk best candidates, ties to the lower index, NaN never."""
    usable = candidates & ~score.isnan()
    ranked = score.masked_fill(~usable, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(ranked)
    rank.scatter_(-1, ranked, torch.arange(score.shape[-1], device=score.device).expand_as(rank))
    return usable & (rank < topk)


# ---- Estimates ----


def check_estimate(scores: Scores, estimate: Tensor, chosen: Tensor, budget: int) -> None:
    """omitted_mass_estimate by the definition, up to rounding."""
    least, most = estimated_omission(scores, chosen, budget)
    assert estimate.dtype == torch.float32 and estimate.shape == least.shape
    assert ((estimate >= 0) & (estimate <= 1)).all(), "omitted_mass_estimate outside [0, 1]"
    error = scores.scan_error
    if scores.selector == "block":
        error = scores.fine.error + scores.scan_part.error
    assert (estimate.double() >= least - error).all(), "omitted_mass_estimate is too small"
    assert (estimate.double() <= most + error).all(), "omitted_mass_estimate is too large"


def estimated_omission(scores: Scores, chosen: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """[B, Hq, Lq] float64, the least and the most that it may be: it is one number unless rounding
    decides what is on the shortlist."""
    heads, query_len = scores.heads, scores.query.shape[2]

    def rows(per_tile: Tensor) -> Tensor:
        return spread_to_rows(per_tile.expand(chosen.shape), heads, query_len)

    left = rows(scores.eligible & ~chosen)
    row = torch.arange(query_len, device=chosen.device)
    pool = row // scores.scan_pool
    coarse = scores.scan_part.by_block[:, :, pool].nan_to_num(-math.inf, math.inf, -math.inf)
    if scores.selector != "block":
        norm = torch.logsumexp(scores.scan_whole.by_block, -1)[:, :, pool]
        share = _shares(coarse.masked_fill(~left, -torch.inf), norm)
        return share, share
    certain, possible = map(scores.to_tiles, shortlist_bounds(scores, budget))
    scan_beside = scores.to_tiles(scores.scan_beside)
    pair = row // scores.refinement_pool
    fine = scores.fine.by_block[:, :, pair].nan_to_num(-math.inf, math.inf, -math.inf)
    rest = coarse + math.log(MIDDLE / FINE)
    # A block counts finely where the tile walks it, else roughly where its scan tile does not; a
    # block that only the scan tile walks does not count. Roughly counted ones are all left out.
    walked = fine.masked_fill(~rows(scores.eligible | scores.beside), -torch.inf)
    unwalked = torch.where(rows(scores.beside), fine, rest)
    unwalked = unwalked.masked_fill(rows(scan_beside & ~scores.beside), -torch.inf)
    inside, outside = rows(certain | chosen), rows(~possible)
    least, most = (
        torch.where(inside, walked, torch.where(outside, unwalked, either(walked, unwalked)))
        for either in (torch.minimum, torch.maximum)
    )
    left |= ~inside & rows(~scan_beside)
    kept = least.masked_fill(left, -torch.inf)
    bounds = []
    for terms in (least, most):
        omitted = terms.masked_fill(~left, -torch.inf)
        whole = torch.logsumexp(torch.cat([kept, omitted], -1), -1)
        bounds.append(_shares(omitted, whole))
    return bounds[0], bounds[1]


def _shares(parts: Tensor, whole: Tensor) -> Tensor:
    """exp(sum of the parts - whole), 0 where there is no whole."""
    share = (torch.logsumexp(parts, -1) - whole).exp()
    return torch.where(whole.isfinite(), share, 0.0)
