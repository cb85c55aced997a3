"""The definition once more, written from docs/definition.md alone, in numpy and float64.

It shares no code with tests/testkit, with the C++ reference or with the fakes, on purpose: what one
of them misread, another reads again. One KV head of one batch entry at a time, tile by tile.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Array = Any  # a numpy.ndarray
BLOCK = 64
EPS = 2.0**-24
UNIT = {torch.float32: EPS, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def rounded(values: Array, dtype: torch.dtype) -> Array:
    """To float32, then to the dtype."""
    single = torch.from_numpy(np.ascontiguousarray(values)).float()
    return single.to(dtype).double().numpy()


@dataclass(frozen=True)
class Head:
    """A KV head with its query heads: q [G, Lq, D], k and v [Lk, D], in float64."""

    q: Array
    k: Array
    v: Array
    window: int
    anchors: int
    causal: bool
    scale: float
    dtype: torch.dtype

    @property
    def positions(self) -> Array:
        """Of the queries: bottom-right aligned."""
        return np.arange(self.q.shape[1]) + self.k.shape[0] - self.q.shape[1]

    @property
    def tile(self) -> int:
        """Positions of a tile."""
        size = 64
        while size * self.q.shape[0] > 128:
            size //= 2
        return size

    @property
    def tiles(self) -> list[Array]:
        """Query numbers of each tile."""
        return [
            np.arange(begin, min(begin + self.tile, self.q.shape[1]))
            for begin in range(0, self.q.shape[1], self.tile)
        ]

    @property
    def blocks(self) -> int:
        return -(-len(self.k) // BLOCK)

    def visible(self, queries: Array) -> Array:
        """[queries, keys]"""
        keys, p = np.arange(self.k.shape[0]), self.positions[queries, None]
        return (keys <= p) | np.full_like(keys > p, not self.causal)

    def ranged(self, queries: Array) -> Array:
        """Anchors and window, visible ones."""
        keys, p = np.arange(self.k.shape[0]), self.positions[queries, None]
        near = keys > p - self.window if self.causal else np.abs(keys - p) < self.window
        return self.visible(queries) & ((keys < self.anchors) | near)

    def by_block(self, keys: Array) -> Array:
        """Does a block hold one of the keys? [.., keys] -> [.., blocks]"""
        pad = self.blocks * BLOCK - keys.shape[-1]
        padded = np.pad(keys, [(0, 0)] * (keys.ndim - 1) + [(0, pad)])
        return padded.reshape(*keys.shape[:-1], self.blocks, BLOCK).any(-1)

    def range_blocks(self, queries: Array) -> Array:
        """Blocks with anchors or window keys of some row of the tile."""
        return self.by_block(self.ranged(queries)).any(0)

    def eligible(self, queries: Array, far_field: bool) -> Array:
        rest = self.visible(queries) & ~self.ranged(queries)
        found = self.by_block(rest).any(0)
        return found & ~self.range_blocks(queries) if far_field else found


# ---- Summaries ----


def unit_means(x: Array, keys: int) -> Array:
    """Means of units of so many keys, of the keys that a unit has."""
    return np.stack([x[b : b + keys].mean(0) for b in range(0, len(x), keys)])


@dataclass
class Units:
    """Scores of all units of a level and which keys they stand for."""

    scores: Array  # [pooled queries, units]
    last: Array  # last key of each unit
    block: Array  # of each unit

    def visible(self, p: Array, causal: bool) -> Array:
        seen = self.last <= p[:, None]
        return seen if causal else np.ones_like(seen)


def unpack(summaries: Array, selector: str, blocks: int) -> dict[int, Array]:
    """Summary rows of each unit size: {keys of a unit: [units, row]}."""
    width = {"block": 9, "quest": 4, "mean": 1}[selector]
    rows = summaries.reshape(blocks, width, -1)
    if selector == "block":
        return {8: rows[:, :8].reshape(blocks * 8, -1), 64: rows[:, 8]}
    return {BLOCK // width: rows.reshape(blocks * width, -1)}


def units(head: Head, rows: Array, keys: int, pooled: Array, selector: str) -> Units:
    length = head.k.shape[0]
    count = -(-length // keys)  # those past the keys are never visible
    rows = rows[:count]
    if selector == "quest":
        d = pooled.shape[-1]
        scores = np.maximum(pooled, 0) @ rows[:, :d].T + np.minimum(pooled, 0) @ rows[:, d:].T
    else:
        scores = pooled @ rows.T
    first = np.arange(count) * keys
    return Units(head.scale * scores, np.minimum(first + keys, length) - 1, first // BLOCK)


# ---- Selection ----


@dataclass
class Scan:
    """What selection knows of a tile: pooled queries, their units, and the masses of blocks."""

    pooled: Array
    p: Array  # positions of pooled queries
    mass_units: Units
    masses: Array  # [blocks], the maximum over pooled queries
    member: Array  # pooled query of each (head, query) of the tile


def pool(head: Head, queries: Array) -> tuple[Array, Array, Array]:
    """Pooled queries [G * pools, D], their positions, and [G, queries] which one a row is in."""
    size = min(8, head.tile)
    means, p, group = [], [], head.q.shape[0]
    starts = range(0, len(queries), size)
    for g in range(group):
        for start in starts:
            part = queries[start : start + size]
            means.append(head.q[g, part].mean(0))
            p.append(head.positions[part[-1]])
    member = np.arange(group)[:, None] * len(starts) + np.arange(len(queries))[None] // size
    return rounded(np.array(means), head.dtype), np.array(p), member


def scan(head: Head, queries: Array, summaries: Array, selector: str) -> Scan:
    pooled, p, member = pool(head, queries)
    levels = unpack(summaries, selector, head.blocks)
    sized = {n: units(head, rows, n, pooled, selector) for n, rows in levels.items()}
    mass_units, norm_units = sized[min(sized)], sized[max(sized)]
    hidden = np.where(mass_units.visible(p, head.causal), mass_units.scores, -np.inf)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        sums = np.where(norm_units.visible(p, head.causal), np.exp(norm_units.scores), 0).sum(1)
        hottest = np.full((len(p), head.blocks), -np.inf)
        np.maximum.at(hottest.T, mass_units.block, hidden.T)
        masses = np.where(sums[:, None] > 0, np.exp(hottest) / sums[:, None], 0)
    return Scan(pooled, p, mass_units, masses.max(0), member)


def key_masses(head: Head, found: Scan, walked: Array) -> tuple[Array, Array]:
    """For a single query that is given the keys: masses of blocks by their keys, and the exp of the
    scores of visible keys [G, keys]; `walked` is W."""
    with np.errstate(over="ignore"):
        keys = np.exp(head.scale * found.pooled @ head.k.T) * head.visible(np.array([0]))
        short = np.exp(found.mass_units.scores) * found.mass_units.visible(found.p, head.causal)
    norm = 8 * (short * walked[found.mass_units.block]).sum(1)
    sums = np.add.reduceat(keys, np.arange(0, keys.shape[1], BLOCK), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(sums / norm[:, None]).max(0), keys


def selection_estimate(head: Head, found: Scan, walked: Array) -> Array:
    """[G, queries]: the share that a row's pooled query has in blocks that are not walked."""
    with np.errstate(over="ignore", invalid="ignore"):
        terms = np.exp(found.mass_units.scores) * found.mass_units.visible(found.p, head.causal)
        share = (terms * ~walked[found.mass_units.block]).sum(1) / terms.sum(1)
    return np.nan_to_num(share)[found.member]


def key_estimate(head: Head, keys: Array, walked: Array) -> Array:
    """[G, 1]: of a single query whose shortlist was all there is; `keys` as of key_masses."""
    outside = ~walked[np.arange(head.k.shape[0]) // BLOCK]
    with np.errstate(invalid="ignore"):
        return np.nan_to_num((keys * outside).sum(1) / keys.sum(1))[:, None]


# ---- Attention ----


@dataclass
class Support:
    """Of a tile: keys that each row attends, and the pools that all its rows condense."""

    attended: Array  # [queries, keys]
    pools: list[tuple[float, Array, Array, Array]] = field(default_factory=list)
    # (keys, mean key, mean value, largest |mean key| of its blocks)
    pool_blocks: int = 1


def support(
    head: Head, queries: Array, listed: Array, far_field: bool, means: tuple[Array, ...]
) -> Support:
    """`listed` [blocks] bool; `means` are those of blocks of keys and of values, as rounded."""
    visible = head.visible(queries)
    of_key = np.arange(head.k.shape[0]) // BLOCK
    if not far_field:
        return Support(head.ranged(queries) | (visible & listed[of_key]))
    walked = listed | head.range_blocks(queries)
    whole = ~head.by_block(~visible).any(0)  # seen in full by all rows
    far_end = int(np.argmin(whole)) if not whole.all() else head.blocks
    condensed = ~walked & (np.arange(head.blocks) < far_end)
    size = 1
    while -(-head.blocks // size) > 128:
        size *= 2
    keys = np.minimum(head.k.shape[0] - np.arange(head.blocks) * BLOCK, BLOCK).astype(float)
    made = Support(visible & walked[of_key], pool_blocks=size)
    for begin in range(0, head.blocks, size):
        part = np.arange(begin, min(begin + size, head.blocks))
        part = part[condensed[part]]
        if len(part):
            n = keys[part].sum()
            k, v = (rounded((keys[part, None] * m[part]).sum(0) / n, head.dtype) for m in means)
            made.pools.append((n, k, v, np.abs(means[0][part]).max(0)))
    return made


@dataclass
class Attended:
    """Results of a tile's rows [G, queries, ..] with their bounds."""

    out: Array
    out_bound: Array
    lse: Array
    lse_bound: Array
    estimate: Array  # with far field and more than one query
    estimate_bound: Array


def _gap(head: Head, queries: Array, listed: Array, scores: Array, terms: Array) -> Array:
    """[G, queries]: the mean over sampled blocks of log(mean exp) - mean of the scores."""
    entries = np.flatnonzero(listed)
    stride = max(1, -(-len(entries) // 8))
    visible = head.visible(queries)
    gaps, weights = np.zeros(scores.shape[:2]), np.zeros(scores.shape[:2])
    largest = np.max(terms, axis=-1, initial=-np.inf)
    for block in entries[::stride]:
        keys = slice(block * BLOCK, block * BLOCK + BLOCK)
        if (block + 1) * BLOCK > head.k.shape[0] or not visible[:, keys].all():
            continue
        s = scores[..., keys]
        log_mean = np.log(np.exp(s - s.max(-1, keepdims=True)).mean(-1)) + s.max(-1)
        counted = log_mean + np.log(BLOCK) >= largest - 64 * np.log(2)
        gaps += np.where(counted, log_mean - s.mean(-1), 0)
        weights += counted
    return np.where(weights > 0, gaps / np.maximum(weights, 1), 0)


def attend(head: Head, queries: Array, made: Support, listed: Array) -> Attended:
    u, d = UNIT[head.dtype], head.k.shape[1]
    q = head.q[:, queries]
    scores = head.scale * np.einsum("gqd,kd->gqk", q, head.k)
    sizes = abs(head.scale) * np.einsum("gqd,kd->gqk", np.abs(q), np.abs(head.k))
    terms = np.where(made.attended, scores, -np.inf)
    values, wrong = head.v, np.zeros((*scores.shape[:2], len(made.pools)))
    if made.pools:
        n = np.array([pool[0] for pool in made.pools])
        k, v, most = (np.array([pool[i] for pool in made.pools]) for i in (1, 2, 3))
        pooled = head.scale * np.einsum("gqd,kd->gqk", q, k)
        slack = 2 * u + 64 * EPS * made.pool_blocks
        wrong = slack * abs(head.scale) * np.einsum("gqd,kd->gqk", np.abs(q), most)
        terms = np.concatenate([terms, pooled + np.log(n)], -1)
        values = np.concatenate([values, v])
        sizes = np.concatenate([sizes, wrong / slack], -1)
    if terms.shape[-1] == 0:
        terms = np.full((*terms.shape[:2], 1), -np.inf)
        values, sizes = np.zeros((1, d)), np.zeros(terms.shape)
    top = terms.max(-1, keepdims=True)
    floor = np.where(np.isfinite(top), top, 0)
    weights = np.exp(terms - floor)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + floor)[..., 0]
    p = weights / np.where(total > 0, total, 1)
    out, size = p @ values, p @ np.abs(values)
    largest = np.where(np.isfinite(terms), sizes, 0).max(-1, keepdims=True)
    count = np.isfinite(terms).sum(-1, keepdims=True)
    far = p[..., len(p[0, 0]) - len(made.pools) :]
    off = np.expm1((far * wrong).sum(-1, keepdims=True))
    bound = u * (size + np.abs(out)) * (1 + 2 * u)
    bound = bound + (2 * (d + 4) * EPS * largest + (count + 16) * EPS) * size
    bound = bound + off * (size + np.abs(out))
    if made.pools:
        bound = bound + (2 * u + 64 * EPS * made.pool_blocks) * (far @ np.abs(v))
        spread = wrong.max(-1, keepdims=True)
        bound = bound + np.expm1(spread) * (far @ np.abs(v) + far.sum(-1, keepdims=True) * abs(out))
    lse_bound = 4 * EPS * (largest[..., 0] + np.abs(np.where(np.isfinite(lse), lse, 0)) + 16)
    share = far.sum(-1)
    gap = _gap(head, queries, listed, scores, terms) if made.pools else np.zeros(share.shape)
    raised = share * np.exp(gap)
    estimate = np.where(raised > 0, raised / (1 - share + raised), 0)
    estimate_bound = 2e-4 + 4 * (wrong.max(-1, initial=0) + 1e-3) * estimate
    return Attended(out, bound, lse, lse_bound + 2 * off[..., 0], estimate, estimate_bound)
