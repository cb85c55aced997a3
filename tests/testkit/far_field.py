"""The far field of docs/architecture.md in float64, and how far rounding may move it.

Written from the definition: what a tile walks is attended in whole blocks, every other block that
all rows of the tile see in full is condensed, consecutive blocks together as one term.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    kv_len, head_dim = key.shape[2], query.shape[3]
    heads, tiles = query.shape[1], Tiles(query, key.shape[1])
    factor = oracle.as_float32(oracle.default_scale(head_dim) if scale is None else scale)
    unit = UNIT_ROUNDOFF[query.dtype]
    pooled_key, pooled_value = (pool_rows(m, division, kv_len) for m in means)
    count = spread_to_rows(count_keys(division, kv_len), heads, query.shape[2])
    log_count, used = count.clamp(min=1).log(), count > 0

    # Scores and their sizes: attended keys, then pools.
    far = factor * tiles.times(query.double(), pooled_key.mean.mT) + log_count
    near = oracle.scores(query, key, scale).masked_fill(~division.attended, -torch.inf)
    terms = torch.cat([near, far.masked_fill(~used, -torch.inf)], -1)
    lse = torch.logsumexp(terms, -1)
    prob = (terms - lse[..., None]).exp()
    prob = prob.masked_fill(torch.cat([~division.attended, ~used], -1), 0.0)
    of_keys, of_pools = prob.split([kv_len, far.shape[-1]], -1)
    size = oracle.scores(query.abs(), key.abs(), None if scale is None else abs(scale))
    size = torch.where(division.attended, size, 0.0)
    far_key = pooled_key.mean.abs().nan_to_num(0.0, 0.0, 0.0)
    far_size = abs(factor) * tiles.times(query.double().abs(), far_key.mT)
    size = torch.cat([size, torch.where(used, far_size + log_count, 0.0)], -1)
    size = pad(size, (0, 1)).amax(-1)

    # Values.
    near_raw = oracle.expand_heads(value, heads)
    near_value = near_raw.nan_to_num(0.0, 0.0, 0.0)
    far_value = pooled_value.mean.nan_to_num(0.0, 0.0, 0.0)
    out = of_keys @ near_value + tiles.times(of_pools, far_value)
    weight = of_keys @ near_value.abs() + tiles.times(of_pools, far_value.abs())

    # What rounded pools change.
    exponent = abs(factor) * tiles.times(query.double().abs(), pooled_key.error.mT)
    exponent = torch.where(used, exponent, 0.0).nan_to_num(0.0, 0.0, 0.0)
    shift = (of_pools * exponent.expm1()).sum(-1, keepdim=True).log1p()
    moved_keys = of_keys * shift.expm1()
    moved_pools = of_pools * (exponent + shift).expm1()
    pooled_error = moved_keys @ near_value.abs()
    pooled_error += tiles.times(moved_pools, far_value.abs() + pooled_value.error)
    pooled_error += tiles.times(of_pools, pooled_value.error)

    terms_used = (division.attended.sum(-1, keepdim=True) + used.sum(-1, keepdim=True)).double()
    accumulate = 2 * (head_dim + 4) * EPS * size[..., None] + (terms_used + 16) * EPS
    bound = (unit * (weight + out.abs()) + pooled_error) * (1 + 2 * unit) + accumulate * weight
    lse_bound = 4 * EPS * (size + lse.abs().nan_to_num(posinf=0.0) + 16) + shift[..., 0]
    broken = (division.attended.double() @ (~near_raw.isfinite()).double()) > 0
    broken |= tiles.times(used.double(), (~pooled_value.mean.isfinite()).double()) > 0
    finite = prob.sum(-1, keepdim=True).isfinite() & ~broken
    return oracle.Reference(out, lse, bound, lse_bound, finite)
