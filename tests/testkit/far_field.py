"""The far field of docs/definition.md in float64, and how far rounding may move it.

Written from the definition: what a tile walks is attended in whole blocks, every other block that
all rows of the tile see in full is condensed, consecutive blocks together as one term.
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
    Ranges,
    ceil_div,
    spread_to_rows,
    tile_positions,
)
from tests.testkit.oracle import EPS, UNIT_ROUNDOFF

MOST_POOLS = 128
GAP_BLOCKS = 8  # sampled blocks of a tile, at most
# Half the distance of subnormal numbers, where the unit roundoff says nothing.
SMALLEST_ROUNDING = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134, torch.float32: 2.0**-150}


def pool_blocks(kv_len: int) -> int:
    """Consecutive blocks of one pool: the smallest power of two that leaves at most 128 pools."""
    blocks = ceil_div(kv_len, BLOCK_KEYS)
    return next(g for g in (2**n for n in range(40)) if ceil_div(blocks, g) <= MOST_POOLS)


def keys_of_blocks(kv_len: int, device: str | torch.device) -> Tensor:
    """[blocks] float64: 64 of each, fewer in the last one."""
    first = torch.arange(0, kv_len, BLOCK_KEYS, device=device)
    return (kv_len - first).clamp(max=BLOCK_KEYS).double()


@dataclass(frozen=True)
class Division:
    """What the rows of every tile attend and what they condense."""

    walked: Tensor  # bool [B, Hkv, T, blocks]
    condensed: Tensor  # bool [B, Hkv, T, blocks]
    attended: Tensor  # bool [B, Hq, Lq, Lk]
    counted: Tensor  # bool [B, Hq, Lq, Lk]: attended, or a key of a condensed block


def divide(ranges: Ranges, listed: Tensor, query_heads: int) -> Division:
    """`listed`: the valid entries of the lists, bool [B, Hkv, T, blocks]."""
    group = query_heads // listed.shape[1]
    walked = listed | ranges.beside(group)
    condensed = ranges.seen_by_all(group) & ~walked

    def rows(blocks: Tensor) -> Tensor:
        keys = blocks.repeat_interleave(BLOCK_KEYS, dim=-1)[..., : ranges.kv_len]
        return spread_to_rows(keys, query_heads, ranges.query_len)

    attended = ranges.visible() & rows(walked)
    return Division(walked, condensed, attended, attended | rows(condensed))


@dataclass(frozen=True)
class PooledRows:
    """Mean rows of pools over the keys that a tile condenses, before they are rounded."""

    mean: Tensor  # [B, Hkv, T, pools, D] float64; 0 where nothing is condensed
    error: Tensor  # how far the row that a kernel takes may be from it


def _by_pool(per_block: Tensor, size: int, dim: int) -> Tensor:
    """Sums of `size` consecutive blocks along a negative dim."""
    pools = ceil_div(per_block.shape[dim], size)
    padding = [0, 0] * (-dim - 1) + [0, pools * size - per_block.shape[dim]]
    return pad(per_block, padding).unflatten(dim, (pools, size)).sum(dim)


def count_keys(division: Division, kv_len: int) -> Tensor:
    """n of every pool: [B, Hkv, T, pools] float64."""
    keys = keys_of_blocks(kv_len, division.condensed.device)
    return _by_pool(division.condensed * keys, pool_blocks(kv_len), -1)


def pool_rows(means: Tensor, division: Division, kv_len: int) -> PooledRows:
    """`means`: [B, Hkv, blocks, D], the rounded means of the blocks."""
    size = pool_blocks(kv_len)
    count = count_keys(division, kv_len).clamp(min=1)[..., None]
    keys = keys_of_blocks(kv_len, means.device)[:, None]
    raw = means.double()
    finite = raw.nan_to_num(0.0, 0.0, 0.0)

    def total(rows: Tensor) -> Tensor:
        condensed = division.condensed[..., None]
        return _by_pool(torch.where(condensed, rows[:, :, None], 0.0), size, -2)

    mean = total(keys * finite) / count
    up, down = total((raw == torch.inf).double()) > 0, total((raw == -torch.inf).double()) > 0
    mean = mean.masked_fill(up, torch.inf).masked_fill(down, -torch.inf)
    broken = (total(raw.isnan().double()) > 0) | (up & down)
    mean = mean.masked_fill(broken, torch.nan)
    return PooledRows(mean, _rounding(means.dtype, finite, keys, mean, count, size))


def _rounding(
    dtype: torch.dtype, means: Tensor, keys: Tensor, mean: Tensor, count: Tensor, size: int
) -> Tensor:
    """A float32 sum over the whole pool, less its walked blocks, divided and rounded to dtype."""
    largest = _by_pool(keys * means.abs(), size, -2)[:, :, None]
    summed = (2 * size + 4) * EPS * largest / count
    value = mean.abs().nan_to_num(0.0, 0.0, 0.0) + summed
    return summed + UNIT_ROUNDOFF[dtype] * value + SMALLEST_ROUNDING[dtype]


class Tiles:
    """Products of rows with what their tile shares."""

    def __init__(self, query: Tensor, kv_heads: int) -> None:
        self.group = query.shape[1] // kv_heads
        self.query_len = query.shape[2]
        self.positions = tile_positions(self.group)

    def times(self, rows: Tensor, shared: Tensor) -> Tensor:
        """[B, Hq, Lq, X] times [B, Hkv, T, X, Y] -> [B, Hq, Lq, Y]."""
        padded = pad(rows, (0, 0, 0, -self.query_len % self.positions))
        tiled = padded.unflatten(2, (shared.shape[2], self.positions))
        product = tiled @ shared.repeat_interleave(self.group, dim=1)
        return product.flatten(2, 3)[:, :, : self.query_len]


class Terms:
    """The terms of every row's softmax: attended keys, then the pools of its tile.

    `key_means`: [B, Hkv, blocks, D], the rounded means of the blocks' keys.
    """

    def __init__(
        self, query: Tensor, key: Tensor, division: Division, key_means: Tensor,
        scale: float | None,
    ) -> None:  # fmt: skip
        kv_len, head_dim = key.shape[2], query.shape[3]
        self.attended, self.kv_len, self.head_dim = division.attended, kv_len, head_dim
        self.tiles = Tiles(query, key.shape[1])
        factor = oracle.as_float32(oracle.default_scale(head_dim) if scale is None else scale)
        pooled = pool_rows(key_means, division, kv_len)
        count = spread_to_rows(count_keys(division, kv_len), query.shape[1], query.shape[2])
        log_count, self.used = count.clamp(min=1).log(), count > 0  # [B, Hq, Lq, pools]

        self.scores = oracle.scores(query, key, scale)  # [B, Hq, Lq, Lk], attended or not
        self.near = self.scores.masked_fill(~self.attended, -torch.inf)
        far = factor * self.tiles.times(query.double(), pooled.mean.mT) + log_count
        self.far = far.masked_fill(~self.used, -torch.inf)  # [B, Hq, Lq, pools]

        # How far the rounding of a pool's mean moves its score: [B, Hq, Lq, pools].
        moved = abs(factor) * self.tiles.times(query.double().abs(), pooled.error.mT)
        self.exponent = torch.where(self.used, moved, 0.0).nan_to_num(0.0, 0.0, 0.0)

        size = oracle.scores(query.abs(), key.abs(), None if scale is None else abs(scale))
        size = torch.where(self.attended, size, 0.0)
        far_key = pooled.mean.abs().nan_to_num(0.0, 0.0, 0.0)
        far_size = abs(factor) * self.tiles.times(query.double().abs(), far_key.mT) + log_count
        size = torch.cat([size, torch.where(self.used, far_size, 0.0)], -1)
        self.size = pad(size, (0, 1)).amax(-1)  # [B, Hq, Lq]: of the largest score

    @cached_property
    def count(self) -> Tensor:
        """[B, Hq, Lq] float64"""
        return (self.attended.sum(-1) + self.used.sum(-1)).double()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    division: Division,
    means: tuple[Tensor, Tensor],
    scale: float | None = None,
) -> oracle.Reference:
    """Softmax over the attended keys and the pools; `means` of the blocks of key and value.

    The bound is the oracle's over all terms, and what the rounding of pooled rows adds: exponents
    that are off by x_j, and values off by their own error. With E = log(sum p exp(x)) the weight
    of a term is off by a factor of at most exp(x + E), and the log-sum-exp by at most E.
    """
    terms, tiles = Terms(query, key, division, means[0], scale), Tiles(query, key.shape[1])
    used, unit = terms.used, UNIT_ROUNDOFF[query.dtype]
    pooled_value = pool_rows(means[1], division, terms.kv_len)
    scores = torch.cat([terms.near, terms.far], -1)
    lse = torch.logsumexp(scores, -1)
    prob = (scores - lse[..., None]).exp()
    prob = prob.masked_fill(torch.cat([~division.attended, ~used], -1), 0.0)
    of_keys, of_pools = prob.split([terms.kv_len, used.shape[-1]], -1)

    # Values.
    near_raw = oracle.expand_heads(value, query.shape[1])
    near_value = near_raw.nan_to_num(0.0, 0.0, 0.0)
    far_value = pooled_value.mean.nan_to_num(0.0, 0.0, 0.0)
    out = of_keys @ near_value + tiles.times(of_pools, far_value)
    weight = of_keys @ near_value.abs() + tiles.times(of_pools, far_value.abs())

    # What rounded pools change.
    shift = (of_pools * terms.exponent.expm1()).sum(-1, keepdim=True).log1p()
    moved_keys = of_keys * shift.expm1()
    moved_pools = of_pools * (terms.exponent + shift).expm1()
    pooled_error = moved_keys @ near_value.abs()
    pooled_error += tiles.times(moved_pools, far_value.abs() + pooled_value.error)
    pooled_error += tiles.times(of_pools, pooled_value.error)

    size = terms.size
    accumulate = 2 * (terms.head_dim + 4) * EPS * size + (terms.count + 16) * EPS
    bound = (unit * (weight + out.abs()) + pooled_error) * (1 + 2 * unit)
    bound += accumulate[..., None] * weight
    lse_bound = 4 * EPS * (size + lse.abs().nan_to_num(posinf=0.0) + 16) + shift[..., 0]
    broken = (division.attended.double() @ (~near_raw.isfinite()).double()) > 0
    broken |= tiles.times(used.double(), (~pooled_value.mean.isfinite()).double()) > 0
    finite = prob.sum(-1, keepdim=True).isfinite() & ~broken
    return oracle.Reference(out, lse, bound, lse_bound, finite)


# ---- The estimate of the omitted mass ----


def sampled_blocks(ranges: Ranges, listed: Tensor, group: int) -> Tensor:
    """bool [B, Hkv, T, blocks]: every ceil(n / 8)-th of the n listed blocks, if all rows of the
    tile see 64 keys of it. `listed` holds every entry of the list: none of them is invalid."""
    stride = (-(-listed.sum(-1, keepdim=True) // GAP_BLOCKS)).clamp(min=1)
    every = (listed.cumsum(-1) - 1) % stride == 0
    whole = keys_of_blocks(ranges.kv_len, ranges.device) == BLOCK_KEYS
    return listed & every & ranges.seen_by_all(group) & whole


@dataclass(frozen=True)
class Gap:
    """The Jensen gap of every row, [B, Hq, Lq]."""

    mean: Tensor  # float64
    known: Tensor  # bool: no sampled block is so light that float32 may not count it


def jensen_gap(terms: Terms, sampled: Tensor) -> Gap:
    """By how much keys outweigh their mean score, in log, on average over the sampled blocks."""
    heads, query_len = terms.scores.shape[1:3]
    blocks = sampled.shape[-1]
    filled = pad(terms.scores, (0, blocks * BLOCK_KEYS - terms.kv_len))
    scores = filled.unflatten(-1, (blocks, BLOCK_KEYS))
    weight = torch.logsumexp(scores, -1)
    largest = pad(torch.cat([terms.near, terms.far], -1), (0, 1), value=-torch.inf).amax(-1)
    rows = spread_to_rows(sampled, heads, query_len)
    lightness = largest[..., None] - weight  # log2 of it: 64 are not counted, fewer may not be
    counted = rows & (lightness <= 64 * math.log(2))
    gap = weight - math.log(BLOCK_KEYS) - scores.mean(-1)
    mean = torch.where(counted, gap, 0.0).sum(-1) / counted.sum(-1)
    known = ~(rows & ~(lightness <= 40 * math.log(2))).any(-1)
    return Gap(torch.where(mean.isfinite(), mean, 0.0), known)


@dataclass(frozen=True)
class Estimate:
    """omitted_mass_estimate, [B, Hq, Lq] float64, and the least and the most that it may be."""

    share: Tensor
    least: Tensor
    most: Tensor


def estimated_omission(
    query: Tensor,
    key: Tensor,
    division: Division,
    key_means: Tensor,
    sampled: Tensor,
    scale: float | None = None,
) -> Estimate:
    """F e^g / (S + F e^g): S over attended keys, F over pools, g the mean gap of sampled blocks.

    Rounding moves every score, hence F, S and e^g by a factor. S may be what the sum of both
    exceeds F by, so it may be off by a part of that sum. Pools that weigh less than 2^-125 of the
    row's largest term may be lost: float32 has no smaller normal numbers.
    """
    terms = Terms(query, key, division, key_means, scale)
    gap = jensen_gap(terms, sampled)
    kept, pools, moved = map(_log_sum, (terms.near, terms.far, terms.far + terms.exponent))
    moved = (moved - pools).nan_to_num(0.0)  # the most that rounded means add to log F
    rounding = (terms.count + 64) * EPS
    error = moved + 4 * (terms.head_dim + 8) * EPS * terms.size + 2 * rounding
    lost = rounding.log() + torch.logaddexp(kept, pools)
    largest = torch.cat([terms.near, terms.far], -1)  # of no key: nothing to take the largest of
    largest = largest.amax(-1) if largest.shape[-1] else pools
    light = terms.far < largest[..., None] - 125 * math.log(2)
    sure_pools = _log_sum(terms.far.masked_fill(light, -torch.inf))
    # Without pools, and for NaN, it is 0 and nothing else.
    there = pools.isfinite() & (kept < torch.inf)

    def share(of: Tensor, beside: Tensor, off: Tensor | float) -> Tensor:
        return torch.where(there, (of + gap.mean - beside + off).sigmoid(), 0.0)

    least = share(sure_pools, torch.logaddexp(kept, lost), -error)
    most = share(pools, _log_less(kept, lost), error)
    unknown, stored = there & ~gap.known, torch.where(there, 4 * EPS, 0.0)
    least = (least - stored).clamp(min=0).masked_fill(unknown, 0.0)
    most = (most + stored).clamp(max=1).masked_fill(unknown, 1.0)
    return Estimate(share(pools, kept, 0.0), least, most)


def _log_sum(terms: Tensor) -> Tensor:
    """[..., X] -> [...]; X may be 0."""
    return torch.logsumexp(pad(terms, (0, 1), value=-torch.inf), -1)


def _log_less(whole: Tensor, part: Tensor) -> Tensor:
    """log(exp(whole) - exp(part)), -inf where that is not positive."""
    return whole + (-(part - whole).exp().clamp(max=1.0)).log1p()


def check_estimate(expected: Estimate, estimate: Tensor) -> float:
    """omitted_mass_estimate by the definition, up to rounding; returns the largest error."""
    assert estimate.dtype == torch.float32 and estimate.shape == expected.share.shape
    assert ((estimate >= 0) & (estimate <= 1)).all(), "omitted_mass_estimate outside [0, 1]"
    found = estimate.double()
    assert (found >= expected.least).all(), "omitted_mass_estimate is too small"
    assert (found <= expected.most).all(), "omitted_mass_estimate is too large"
    sure = expected.most - expected.least < 1
    error = torch.where(sure, (found - expected.share).abs(), 0.0)
    return float(error.max()) if error.numel() else 0.0
