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
    LEVELS,
    SHORT,
    Budget,
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
    """Of some queries' scores against the units of one size, or against the keys."""

    by_block: Tensor  # [B, Hq, rows, blocks]: log of the sum of exp over the visible ones
    largest: Tensor  # the same: the largest score of a visible one; NaN is none
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
        key: Tensor | None = None,
        far_field: bool = False,
        exact: bool = False,
    ) -> None:
        """`key`: as the call is given it, or None. `far_field`: of the attention that the lists are
        for. `exact`: means and scores are small integers times powers of two, free of rounding."""
        self.query, self.summaries, self.key, self.ranges = query, summaries, key, ranges
        self.selector, self.exact = selector, exact
        self.heads, self.kv_heads = query.shape[1], summaries.shape[1]
        self.group = self.heads // self.kv_heads
        head_dim = query.shape[-1]
        self.factor = oracle.as_float32(oracle.default_scale(head_dim) if scale is None else scale)
        self.beside = ranges.beside(self.group)
        self.joined = scan_tiles(ranges.kv_len) if selector == "block" else 1
        self.eligible = ranges.eligible(self.group)
        self.scan_eligible = self._any_of_joined(self.eligible)
        if far_field:
            self.eligible = self.eligible & ~self.beside
            anchored = torch.arange(self.eligible.shape[1]) * BLOCK_KEYS < ranges.anchors
            several = self.scan_eligible & ~anchored.to(ranges.device)
            self.scan_eligible = self.eligible if self.joined == 1 else several
        self.pool = pool_size(self.group)
        self.scan_pool = self.joined * self.pool

    @property
    def refinement(self) -> str | None:
        """By what the blocks of a shortlist are scored once more, if they are."""
        if self.selector != "block":
            return None
        if self.query.shape[2] == 1 and self.key is not None:
            return "keys"
        return "units" if self.joined > 1 else None

    # What scan tiles [S, blocks] and tiles [T, blocks] have in common.

    @property
    def scan_beside(self) -> Tensor:
        return self._any_of_joined(self.beside)

    def _any_of_joined(self, of_tiles: Tensor) -> Tensor:
        filled = pad(of_tiles, (0, 0, 0, -of_tiles.shape[0] % self.joined))
        return filled.unflatten(0, (-1, self.joined)).any(1)

    def to_tiles(self, of_scan_tiles: Tensor) -> Tensor:
        """[..., S, blocks] -> [..., T, blocks]"""
        return of_scan_tiles.repeat_interleave(self.joined, -2)[..., : self.eligible.shape[0], :]

    # Sums of every kind of query over what the definition names.

    @cached_property
    def scan_part(self) -> LogSums:
        size = SHORT if self.selector == "block" else LEVELS[self.selector][0]
        return self._log_sums(size, self.scan_pool)

    @cached_property
    def scan_whole(self) -> LogSums:
        if self.selector != "block":
            return self.scan_part
        return self._log_sums(COARSE, self.scan_pool)

    @cached_property
    def refined_part(self) -> LogSums:
        """In short units: eight times the sum over them, or the sum over as many keys."""
        return self._log_sums(1, self.pool) if self.refinement == "keys" else self.refined_whole

    @cached_property
    def refined_whole(self) -> LogSums:
        return self._log_sums(SHORT, self.pool)

    def _log_sums(self, size: int, pool: int) -> LogSums:
        d = self.query.shape[-1]
        rows = pooled_queries(self.query, pool).double()
        unit = oracle.expand_heads(self._units(size), self.heads)
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

    def _units(self, size: int) -> Tensor:
        """[B, Hkv, units, Ds]: units of so many keys; of 1 the keys, filled up to whole blocks."""
        if size > 1:
            return level_of(self.summaries, self.selector, size)
        assert self.key is not None
        return pad(self.key, (0, 0, 0, -self.ranges.kv_len % BLOCK_KEYS))

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

    def _of_tiles(self, per_pool: Tensor) -> Tensor:
        """A scan tile has as many pooled queries as a tile."""
        tiled = _runs(per_pool, tile_positions(self.group) // self.pool).amax(3)
        return tiled.unflatten(1, (self.kv_heads, self.group)).amax(2)

    @cached_property
    def scanned(self) -> Tensor:
        """Masses of the scan: of the hottest units, for scan tiles."""
        return self._of_tiles(masses(self.scan_part.largest, self.scan_whole))

    @property
    def scan_error(self) -> float:
        return self.scan_part.error + self.scan_whole.error

    @property
    def refinement_error(self) -> float:
        return self.refined_part.error + self.refined_whole.error

    def refined(self, walked: Tensor) -> Tensor:
        """Masses of the refinement when `walked` [B, Hkv, T, blocks] is W."""
        counted = spread_to_rows(walked, self.heads, self.query.shape[2])[:, :, :: self.pool]
        keys = 1 if self.refinement == "keys" else SHORT  # that an element stands for
        part = self.refined_part.by_block + math.log(keys / SHORT)
        return self._of_tiles(masses(part, self.refined_whole, counted))


# ---- Lists ----


def shortlist_width(refinement: str | None, width: int) -> int:
    """Blocks of a shortlist for lists of so many."""
    return max(64, (4 if refinement == "keys" else 2) * width)


def top_bounds(mass: Tensor, eligible: Tensor, width: int, error: float) -> tuple[Tensor, Tensor]:
    """Blocks that are surely among the `width` heaviest, and those that may be.

    Every mass may be off by the relative error.
    """
    heavy = mass.clamp(min=TINY_MASS).masked_fill(~eligible, 0.0)
    ranked = pad(heavy, (0, width + 1)).topk(width + 1, -1).values
    band = (1 + error) ** 2
    possible = heavy * band >= ranked[..., width - 1 : width]
    return eligible & (heavy > ranked[..., width:] * band), eligible & possible


def shortlist_bounds(scores: Scores, budget: Budget) -> tuple[Tensor, Tensor]:
    """Blocks that are surely on the shortlist of a scan tile, and those that may be."""
    width = shortlist_width(scores.refinement, budget.width)
    return top_bounds(scores.scanned, scores.scan_eligible, width, scores.scan_error)


@dataclass(frozen=True)
class Candidates:
    """Blocks that a list is chosen from, bool [..., blocks], and their masses."""

    certain: Tensor
    possible: Tensor
    least: Tensor  # that a kernel may find
    most: Tensor


def candidates(scores: Scores, budget: Budget) -> Candidates:
    if scores.refinement is None:
        eligible = scores.eligible.expand(scores.scanned.shape)
        return _with_error(eligible, eligible, (scores.scanned,), scores.scan_error)
    certain, possible = (
        scores.to_tiles(bound) & scores.eligible for bound in shortlist_bounds(scores, budget)
    )
    either = tuple(scores.refined(bound | scores.beside) for bound in (certain, possible))
    return _with_error(certain, possible, either, scores.refinement_error)


def _with_error(
    certain: Tensor, possible: Tensor, either: tuple[Tensor, ...], error: float
) -> Candidates:
    least, most = torch.stack(either).amin(0), torch.stack(either).amax(0)
    least = torch.where(least < TINY_MASS, 0.0, least / (1 + error))
    most = torch.where(most > 0, most.clamp(min=TINY_MASS) * (1 + error), 0.0)
    return Candidates(certain, possible, least, most)


def check_lists(scores: Scores, indices: Tensor, counts: Tensor, budget: Budget) -> Tensor:
    """A right list by the definition, up to rounding; returns the chosen blocks as booleans."""
    chosen = check_form(indices, counts, scores.eligible, budget.width)
    found = candidates(scores, budget)
    assert not (chosen & ~found.possible).any(), "a block was taken that cannot be on the shortlist"
    lightest = _lightest(found.most, chosen)
    missing = found.certain & ~chosen & (found.least > lightest[..., None])
    assert not missing.any(), "a block of clearly larger mass was left out"
    eligible, most = scores.eligible.sum(-1), budget.of_heads(scores.kv_heads, chosen.device)
    full = torch.minimum(eligible, most)
    if budget.top_p is None:
        assert torch.equal(counts.long(), full.expand(counts.shape)), "wrong number of blocks"
    else:
        _check_shortened(found, chosen, full, eligible <= most, budget.top_p)
    return chosen


def _lightest(mass: Tensor, chosen: Tensor) -> Tensor:
    """The least mass of a chosen block, infinite where there is none."""
    return pad(mass.masked_fill(~chosen, torch.inf), (0, 1), value=torch.inf).amin(-1)


def _check_shortened(
    found: Candidates, chosen: Tensor, full: Tensor, fits: Tensor, top_p: float
) -> None:
    """Lists that hold the fewest of the `full` heaviest blocks that top_p allows."""
    counts = chosen.sum(-1)
    assert (counts <= full).all(), "more blocks than the budget"
    assert (counts == full)[fits.expand(counts.shape)].all(), "cut though all blocks fit"
    least, most = (
        _sum_of_largest(mass.masked_fill(~among | chosen, 0.0), full - counts)
        for mass, among in ((found.least, found.certain), (found.most, found.possible))
    )
    allowed = 1 - oracle.as_float32(top_p)
    slack = 1 + 2 * oracle.EPS * chosen.shape[-1]  # of a float32 sum
    assert (fits | (least <= allowed * slack)).all(), "more mass than 1 - top_p was left out"
    one_more = most + _lightest(found.most, chosen)
    assert (fits | (one_more * slack > allowed)).all(), "a block more could be left out"


def _sum_of_largest(mass: Tensor, count: Tensor) -> Tensor:
    """[...]: the sum of the `count` largest of [..., blocks]."""
    sums = pad(mass.sort(-1, descending=True).values.cumsum(-1), (1, 0))
    return sums.gather(-1, count[..., None])[..., 0]


def check_form(indices: Tensor, counts: Tensor, eligible: Tensor, width: int) -> Tensor:
    """Counts, order, padding and eligibility of lists; returns bool [B, Hkv, T, blocks]."""
    assert indices.dtype == counts.dtype == torch.int32
    tiles, blocks = eligible.shape
    assert indices.shape == (*counts.shape, width) and counts.shape[-1] == tiles
    assert ((counts >= 0) & (counts <= width)).all(), "count out of range"
    used = torch.arange(width, device=indices.device) < counts[..., None]
    assert (indices[~used] == -1).all(), "lists are not padded with -1"
    assert ((indices >= 0) & (indices < blocks))[used].all(), "block out of range"
    rising = (indices[..., 1:] > indices[..., :-1]) | ~used[..., 1:]
    assert rising.all(), "lists do not ascend strictly"
    slots = torch.where(used, indices, blocks).long()
    chosen = torch.zeros(*counts.shape, blocks + 1, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter_(-1, slots, True)[..., :blocks]
    assert not (chosen & ~eligible).any(), "a block is listed that is not eligible"
    return chosen


def expected_lists(
    mass: Tensor, eligible: Tensor, most: Tensor, top_p: float | None = None
) -> tuple[Tensor, Tensor]:
    """The one right choice where masses are exact: bool chosen, and bool [...] "is it certain?".

    `most` [...] blocks are chosen, with `top_p` fewer. Masses within 1e-9 of each other are ties
    (lower index first). Ones that differ by more than that and less than 1e-5 may come in either
    order: a tile in which that could carry a block over the edge of the list is not certain.
    """
    log_mass = mass.clamp(min=TINY_MASS).log().masked_fill(~eligible, -torch.inf)
    order = log_mass.sort(-1, descending=True)
    gap = (order.values[..., :-1] - order.values[..., 1:]).nan_to_num(0.0)
    level = pad((gap > 1e-9).double().cumsum(-1), (1, 0))[..., : mass.shape[-1]]
    level_of_block = torch.zeros_like(level).scatter_(-1, order.indices, level)
    rank = level_of_block.argsort(dim=-1, stable=True).argsort(dim=-1)
    most = most.expand(mass.shape[:-1])
    count, certain = most, _has_clear_edge(level, gap, most)
    if top_p is not None:
        count, clear = _shortened(mass.gather(-1, order.indices), most, top_p)
        certain = certain & clear & _has_clear_edge(level, gap, count)
    fits = eligible.sum(-1) <= most
    count = torch.where(fits, most, count)
    return (rank < count[..., None]) & eligible, certain | fits


def _has_clear_edge(level: Tensor, gap: Tensor, count: Tensor) -> Tensor:
    """Is it certain which the first `count` blocks are?"""
    blocks = level.shape[-1]
    inside = (count > 0) & (count < blocks)
    levels = pad(level, (0, 2))
    last = levels.gather(-1, (count - 1).clamp(0, blocks)[..., None])
    first = levels.gather(-1, count.clamp(0, blocks)[..., None])
    # The gap below the level of the last block inside, and above it if it goes on outside.
    edge = (level[..., :-1] == last) | ((last == first) & (level[..., 1:] == last))
    return ~inside | ~(edge & (gap > 1e-9) & (gap < 1e-5)).any(-1)


def _shortened(ranked: Tensor, most: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """How many of the first `most` masses top_p keeps, and whether the sums are clear of it."""
    places = torch.arange(ranked.shape[-1], device=ranked.device)
    listed = torch.where(places < most[..., None], ranked, 0.0)
    left_out = listed.flip(-1).cumsum(-1).flip(-1)  # by a list that ends before the place
    allowed = 1 - oracle.as_float32(top_p)
    near = (left_out > 0) & ((left_out - allowed).abs() <= 1e-5 * allowed + TINY_MASS)
    return (left_out > allowed).sum(-1), ~near.any(-1)


def expected_choice(scores: Scores, budget: Budget) -> tuple[Tensor, Tensor]:
    """The one right choice where scores are exact, bool [B, Hkv, T, blocks], and "is it certain?".

    What is certain of a tile is as in expected_lists.
    """
    most = budget.of_heads(scores.kv_heads, scores.query.device)
    if scores.refinement is None:
        return expected_lists(scores.scanned, scores.eligible, most, budget.top_p)
    shared, certain = expected_shortlist(scores, budget)
    shortlist = scores.to_tiles(shared) & scores.eligible
    mass = scores.refined(shortlist | scores.beside)
    chosen, certain_list = expected_lists(mass, shortlist, most, budget.top_p)
    certain = scores.to_tiles(certain[..., None])[..., 0]
    return chosen, (certain & certain_list) | (scores.eligible.sum(-1) <= most)


def expected_shortlist(scores: Scores, budget: Budget) -> tuple[Tensor, Tensor]:
    """The same of the shortlists of scan tiles."""
    most = shortlist_width(scores.refinement, budget.width)
    width = torch.tensor(most, device=scores.query.device)
    return expected_lists(scores.scanned, scores.scan_eligible, width)


def expected_tokens(score: Tensor, candidates: Tensor, topk: int) -> Tensor:
    """bool [B, Hq, Lq, Lk]: the topk best candidates, ties to the lower index, NaN never."""
    usable = candidates & ~score.isnan()
    ranked = score.masked_fill(~usable, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(ranked)
    rank.scatter_(-1, ranked, torch.arange(score.shape[-1], device=score.device).expand_as(rank))
    return usable & (rank < topk)


# ---- Estimates ----


def check_estimate(scores: Scores, estimate: Tensor, chosen: Tensor, budget: Budget) -> None:
    """omitted_mass_estimate by the definition, up to rounding."""
    least, most = estimated_omission(scores, chosen, budget)
    assert estimate.dtype == torch.float32 and estimate.shape == least.shape
    assert ((estimate >= 0) & (estimate <= 1)).all(), "omitted_mass_estimate outside [0, 1]"
    own = scores.refined_whole if scores.refinement else scores.scan_part
    error = own.error + scores.scan_part.error
    assert (estimate.double() >= least - error).all(), "omitted_mass_estimate is too small"
    assert (estimate.double() <= most + error).all(), "omitted_mass_estimate is too large"


def estimated_omission(scores: Scores, chosen: Tensor, budget: Budget) -> tuple[Tensor, Tensor]:
    """[B, Hq, Lq] float64, the least and the most that it may be: it is one number unless rounding
    decides what is on the shortlist."""
    heads, query_len = scores.heads, scores.query.shape[2]

    def rows(per_tile: Tensor) -> Tensor:
        return spread_to_rows(per_tile.expand(chosen.shape), heads, query_len)

    row = torch.arange(query_len, device=chosen.device)
    seen = scores.scan_part.by_block[:, :, row // scores.scan_pool]
    least = most = seen
    if scores.refinement:
        if scores.refinement == "keys":
            return _omission_by_keys(scores, chosen, budget)
        own = scores.refined_whole.by_block[:, :, row // scores.pool]
        certain, possible = map(scores.to_tiles, shortlist_bounds(scores, budget))
        # `own` where the tile's W has the block, nothing where only that of its scan tile has it.
        shortlisted = own.masked_fill(~rows(scores.eligible | scores.beside), -torch.inf)
        other = seen.masked_fill(rows(scores.to_tiles(scores.scan_beside)), -torch.inf)
        other = torch.where(rows(scores.beside), own, other)
        least, most = (
            torch.where(rows(certain | chosen), shortlisted, torch.where(
                rows(possible), either(shortlisted, other), other))
            for either in (torch.minimum, torch.maximum)
        )  # fmt: skip
    walked = rows(chosen | scores.beside)
    most_blocks = budget.of_heads(scores.kv_heads, chosen.device)
    leaves = (scores.eligible.sum(-1) > most_blocks).expand(chosen.shape[:-1])
    leaves = spread_to_rows(leaves[..., None], heads, query_len)[..., 0]
    return _share_of(least, ~walked) * leaves, _share_of(most, ~walked) * leaves


def _omission_by_keys(scores: Scores, chosen: Tensor, budget: Budget) -> tuple[Tensor, Tensor]:
    """The same of a single query whose shortlist was looked at by its keys; nothing is known of it
    where rounding decides what is on the shortlist."""
    heads = scores.heads

    def rows(per_tile: Tensor) -> Tensor:
        return spread_to_rows(per_tile.expand(chosen.shape), heads, 1)

    certain, possible = map(scores.to_tiles, shortlist_bounds(scores, budget))
    shortlist = (certain & scores.eligible) | chosen
    keys, units = scores.refined_part.by_block, scores.refined_whole.by_block
    left = rows(shortlist & ~chosen & ~scores.beside)
    gap = torch.where(left, keys - units, 0.0).sum(-1) / left.sum(-1).clamp(min=1)
    beyond = scores.scan_part.by_block.masked_fill(rows(certain | scores.beside), -torch.inf)
    beyond = beyond + gap.nan_to_num(0.0, 0.0, 0.0)[..., None]
    known = keys.masked_fill(~rows(shortlist | scores.beside), -torch.inf)
    share = _share_of(torch.cat([known, beyond], -1), torch.cat([left, torch.ones_like(left)], -1))
    most_blocks = budget.of_heads(scores.kv_heads, chosen.device)
    leaves = (scores.eligible.sum(-1) > most_blocks).expand(chosen.shape[:-1])
    share = share * spread_to_rows(leaves[..., None], heads, 1)[..., 0]
    unsure = rows((certain != possible).any(-1, keepdim=True)).any(-1)
    return share.masked_fill(unsure, 0.0), share.masked_fill(unsure, 1.0)


def _share_of(terms: Tensor, omitted: Tensor) -> Tensor:
    """[B, Hq, Lq]: exp(terms) of the omitted blocks over those of all, 0 where there are none."""
    whole = torch.logsumexp(terms, -1)
    share = (torch.logsumexp(terms.masked_fill(~omitted, -torch.inf), -1) - whole).exp()
    return torch.where(whole.isfinite(), share, 0.0)
