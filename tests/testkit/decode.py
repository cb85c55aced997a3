"""Decoding over a cache: random caches, and docs/decoding.md in float64, by brute force.

Written from that page alone. `Cache` holds the tensors of a call as a framework would keep them,
with NaN in every slot that no sequence has and garbage in every table entry that none needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from condensate_ext import KVSummaries, attention_with_kvcache, select_tokens_with_kvcache
from torch import Tensor

from tests.testkit.definition import ceil_div
from tests.testkit.oracle import (
    EPS,
    UNIT_ROUNDOFF,
    Reference,
    as_float32,
    assert_matches,
    default_scale,
)

UNIT = 8
LAYOUTS = ("hnd", "nhd", "interleaved", "side_by_side")
GARBAGE = (-1, -(2**31), 2**31 - 1, 1 << 20)  # entries of a table that nothing may read as pages


@dataclass(frozen=True)
class DecodeCase:
    """A call with everything that decides its content."""

    device: str = "cpu"
    seed: int = 0
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None  # None: the query's
    lengths: tuple[int, ...] = (700,)
    query_len: int = 1
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    page_size: int | None = 64  # None: contiguous
    capacity: int = 1024  # of a sequence; a multiple of the page size
    layout: str = "hnd"
    window: int = 64
    anchors: int = 16
    topk: int = 64
    shortlist: int = 256
    top_p: float | None = None
    far_field: bool = True
    sinks: bool = False
    softcap: float = 0.0
    scale: float | None = None
    centered: bool = False  # keys share an offset, and the summaries know it
    content: str = "normal"  # or "integers": small ones, many of them equal

    def __post_init__(self) -> None:
        if self.device == "cuda" and self.dtype == torch.float32:  # there are no such kernels
            object.__setattr__(self, "dtype", torch.bfloat16)

    @property
    def query_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def pool(self) -> int:
        return 64 if self.page_size is None else min(self.page_size, 64)

    @property
    def real_scale(self) -> float:
        return as_float32(default_scale(self.head_dim) if self.scale is None else self.scale)

    def build(self) -> Cache:
        return _build(self)


@dataclass
class Cache:
    """The tensors of a case."""

    case: DecodeCase
    query: Tensor
    key: Tensor  # [N, Hkv, P, D]
    value: Tensor
    lengths: Tensor  # [B] int32
    table: Tensor | None  # [B, max_pages] int32
    summaries: KVSummaries
    sinks: Tensor | None
    key_scale: Tensor | None
    value_scale: Tensor | None
    shared: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value, self.lengths

    @property
    def update_args(self) -> dict[str, object]:
        return {
            "block_table": self.table,
            "key_scale": self.key_scale,
            "value_scale": self.value_scale,
        }

    @property
    def attend_args(self) -> dict[str, object]:
        """What attention over given tokens takes beside tensors and lists."""
        c = self.case
        return {
            **self.update_args, "window": c.window, "anchors": c.anchors, "sinks": self.sinks,
            "softcap": c.softcap, "scale": c.scale,
        }  # fmt: skip

    @property
    def args(self) -> dict[str, object]:
        """Keywords of attention_with_kvcache."""
        c = self.case
        return {
            **self.attend_args, "summaries": self.summaries, "topk": c.topk, "top_p": c.top_p,
            "shortlist": c.shortlist, "far_field": c.far_field,
        }  # fmt: skip

    @property
    def select_args(self) -> dict[str, object]:
        drop = ("value_scale", "sinks", "far_field")
        return {k: v for k, v in self.args.items() if k not in drop}

    def update(self, appended: int | None = None) -> None:
        """Brings the summaries up to date, by default with all keys."""
        appended = max([1, *self.lengths.tolist()]) if appended is None else appended
        self.summaries.update_(
            self.key, self.value, self.lengths, appended=appended, **self.update_args
        )

    def length(self, b: int) -> int:
        return min(max(int(self.lengths[b]), 0), self.case.capacity)

    def pages(self, b: int) -> Tensor:
        """[length]: the physical page of every key, -1 where the table has none."""
        j = torch.arange(self.length(b), device=self.key.device)
        if self.table is None:
            return torch.full_like(j, b)
        page = self.table[b].long()[j // self.key.shape[2]]
        return torch.where((page >= 0) & (page < self.key.shape[0]), page, -1)

    def stored(self, cache: Tensor, b: int) -> Tensor:
        """[Hkv, length, D] float32 as stored; what a missing page has is NaN."""
        pages = self.pages(b)
        slots = torch.arange(len(pages), device=pages.device) % self.key.shape[2]
        rows = cache.float()[pages.clamp(min=0), :, slots].transpose(0, 1)
        return torch.where((pages < 0)[None, :, None], torch.nan, rows)


def _content(case: DecodeCase, rng: torch.Generator, tokens: int) -> tuple[Tensor, Tensor]:
    """[Hkv, tokens, D] keys and values."""
    shape = (case.kv_heads, tokens, case.head_dim)
    value = torch.randn(shape, generator=rng)
    if case.content == "integers":  # 24 different units, so that units and keys tie
        kinds = torch.randint(-2, 3, (case.kv_heads, 24, UNIT, case.head_dim), generator=rng)
        which = torch.randint(0, 24, (ceil_div(tokens, UNIT),), generator=rng)
        return kinds[:, which].flatten(1, 2)[:, :tokens].float(), value
    key = torch.randn(shape, generator=rng)
    if case.centered:
        key = key + 4 * torch.randn(case.kv_heads, 1, case.head_dim, generator=rng)
    return key, value


def _buffers(case: DecodeCase, pages: int, size: int) -> tuple[Tensor, Tensor]:
    """Views [N, Hkv, P, D] for keys and values, all NaN, in the case's layout."""
    n, h, d = pages, case.kv_heads, case.head_dim
    if case.layout == "hnd":
        key, value = torch.full((2, n, h, size, d), torch.nan)
    elif case.layout == "nhd":
        key, value = (t.transpose(1, 2) for t in torch.full((2, n, size, h, d), torch.nan))
    elif case.layout == "interleaved":
        both = torch.full((n, 2, size, h, d), torch.nan)
        key, value = both[:, 0].transpose(1, 2), both[:, 1].transpose(1, 2)
    else:
        both = torch.full((n, h, size, 2 * d), torch.nan)
        key, value = both[..., :d], both[..., d:]
    return key, value


def _convert(key: Tensor, value: Tensor, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Both views in another dtype and place, with their strides and common memory."""
    whole = key._base if key._base is not None else key
    assert value._base is whole
    moved = whole.to(dtype).to(device)

    def view(t: Tensor) -> Tensor:
        return moved.as_strided(t.shape, t.stride(), t.storage_offset())

    return view(key), view(value)


def _build(case: DecodeCase) -> Cache:
    rng = torch.Generator().manual_seed(case.seed)
    batch, paged = len(case.lengths), case.page_size is not None
    size = case.page_size if case.page_size is not None else case.capacity
    columns = case.capacity // size
    assert columns * size == case.capacity
    pages = batch * columns + 3 if paged else batch
    key, value = _buffers(case, pages, size)
    order = torch.randperm(pages, generator=rng)[: batch * columns].view(batch, columns)
    if not paged:
        order = torch.arange(batch)[:, None]
    fp8 = case.cache_dtype == torch.float8_e4m3fn
    garbage = torch.tensor(GARBAGE)[torch.randint(0, 4, (batch, columns), generator=rng)]
    table = garbage.clone()
    for b, length in enumerate(case.lengths):
        tokens = min(max(length, 0), case.capacity)
        k, v = _content(case, rng, tokens)
        needed = ceil_div(tokens, size)
        table[b, :needed] = order[b, :needed]
        j = torch.arange(tokens)
        key[order[b, j // size], :, j % size] = k.transpose(0, 1)
        value[order[b, j // size], :, j % size] = v.transpose(0, 1)
    query_shape = (batch, case.query_heads, case.query_len, case.head_dim)
    query = torch.randn(query_shape, generator=rng) * 1.5
    if case.content == "integers":
        query = torch.randint(-2, 3, query_shape, generator=rng).float()
    scales = torch.rand(2, case.kv_heads, generator=rng) + 0.5
    key, value = _convert(key, value, case.cache_dtype or case.dtype, case.device)
    center = torch.randn(case.kv_heads, case.head_dim, generator=rng) * 4 if case.centered else None
    sinks = torch.randn(case.query_heads, generator=rng) * 3

    def there(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(case.device)

    cache = Cache(
        case,
        query.to(case.dtype).to(case.device),
        key,
        value,
        torch.tensor(case.lengths, dtype=torch.int32).to(case.device),
        there(table.int()) if paged else None,
        KVSummaries.empty_for(key, paged=paged, key_center=there(center)),
        there(sinks) if case.sinks else None,
        there(scales[0].clone()) if fp8 else None,
        there(scales[1].clone()) if fp8 else None,
    )
    cache.update()
    return cache


# ---- Summaries ----


def round_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits: entries (float32 integers) and their scale, in float32."""
    largest = rows.abs().amax(-1, keepdim=True)
    factor = torch.full_like(largest, 127) / largest  # a number / a tensor would round twice
    usable = factor.isfinite() & largest.isfinite()
    entries = torch.where(usable, (rows * factor).round(), 0.0)
    # On CUDA torch divides by a number by multiplying with its inverse.
    scale = torch.where(usable, largest / torch.full_like(largest, 127), 0.0)
    return entries, torch.where(largest.isfinite(), scale, torch.nan)[..., 0]


def _add_every(rows: Tensor, count: int) -> Tensor:
    """Sums of `count` consecutive rows, one after the other; the last sum may have fewer."""
    sums = torch.zeros(rows.shape[0], ceil_div(rows.shape[1], count), rows.shape[2])
    sums = sums.to(rows.device)
    for first in range(count):
        part = rows[:, first::count]
        sums[:, : part.shape[1]] += part
    return sums


def _counts(tokens: int, size: int, device: torch.device) -> Tensor:
    begin = torch.arange(0, tokens, size, device=device)
    return (tokens - begin).clamp(max=size).float()[:, None]


def mean_rows(cache: Cache, b: int) -> tuple[Tensor, Tensor]:
    """Means in float32 of the units' keys and the pools' values, [Hkv, units or pools, D]."""
    key, value = cache.stored(cache.key, b), cache.stored(cache.value, b)
    pool, tokens = cache.case.pool, key.shape[1]
    units = _add_every(key, UNIT) / _counts(tokens, UNIT, key.device)
    pools = _add_every(_add_every(value, UNIT), pool // UNIT) / _counts(tokens, pool, key.device)
    if cache.key_scale is not None:
        units = units * cache.key_scale[:, None, None]
        pools = pools * cache.value_scale[:, None, None]
    if cache.summaries.key_center is not None:
        units = units - cache.summaries.key_center[:, None]
    return units, pools


def expected_records(cache: Cache) -> tuple[Tensor, Tensor]:
    """What the summaries of a cache hold after an update with all keys; 0 where nothing is."""
    rows, scales = (
        torch.zeros_like(cache.summaries.rows),
        torch.zeros_like(cache.summaries.scales),
    )
    size = cache.key.shape[2]
    units_of_page = ceil_div(size, UNIT)
    for b in range(len(cache.lengths)):
        pages = cache.pages(b)
        for means, keys, first in zip(
            mean_rows(cache, b), (UNIT, cache.case.pool), (0, units_of_page), strict=True
        ):
            entries, scale = round_rows(means)
            for n in range(means.shape[1]):
                page, row = int(pages[n * keys]), first + n * keys % size // keys
                if page >= 0:
                    rows[page, :, row] = entries[:, n].to(torch.int8)
                    scales[page, :, row] = scale[:, n]
    return rows, scales


# ---- What a query attends ----


@dataclass(frozen=True)
class View:
    """One query of one sequence, for all heads [Hkv, G, ...]."""

    case: DecodeCase
    visible: int  # keys that it sees
    there: Tensor  # [visible]: is the key's page there?
    anyway: Tensor  # [visible]: anchor or recent
    key_scores: Tensor  # [Hkv, G, visible] float64
    unit_scores: Tensor  # [Hkv, G, whole units]
    sizes: Tensor  # [Hkv, G]: the largest scale * sum |q||k|
    values: Tensor  # [Hkv, visible, D]
    pool_values: Tensor  # [Hkv, whole pools, D]

    @property
    def candidates(self) -> Tensor:
        return self.there & ~self.anyway

    @property
    def dense(self) -> bool:
        return int((~self.anyway).sum()) <= self.case.shortlist


def _capped(case: DecodeCase, scores: Tensor) -> Tensor:
    return case.softcap * (scores / case.softcap).tanh() if case.softcap > 0 else scores


def view(cache: Cache, b: int, i: int) -> View:
    case = cache.case
    visible = max(cache.length(b) - case.query_len + i + 1, 0)
    query = cache.query[b, :, i].view(case.kv_heads, case.group, case.head_dim)
    key = cache.stored(cache.key, b)[:, :visible].double()
    value = cache.stored(cache.value, b)[:, :visible].double()
    if cache.key_scale is not None:
        key = key * cache.key_scale[:, None, None].double()
        value = value * cache.value_scale[:, None, None].double()
    j, pages = torch.arange(visible, device=key.device), cache.pages(b)
    cut = case.pool * (visible // case.pool)
    recent = max(0, min(visible - case.window, cut))
    anyway = (j < min(case.anchors, recent)) | (j >= recent)
    entries, scales = round_rows(query.float())
    units, pools = (
        rounded.double() * scale[..., None].double()
        for rounded, scale in map(round_rows, mean_rows(cache, b))
    )
    rounded = entries.double() * scales[..., None].double()
    unit_scores = rounded @ units[:, : visible // UNIT].mT
    if cache.summaries.key_center is not None:
        center = cache.summaries.key_center.double()[:, None, :]
        unit_scores = unit_scores + (query.double() * center).sum(-1, keepdim=True)
    scale = case.real_scale
    sizes = abs(scale) * (query.double().abs() @ key.abs().mT).nan_to_num(0.0)
    sizes = torch.nn.functional.pad(sizes, (0, 1)).amax(-1)
    if cache.summaries.key_center is not None:
        sizes = sizes + abs(scale) * (query.double() * center).abs().sum(-1)
    return View(
        case,
        visible,
        pages[:visible] >= 0,
        anyway,
        _capped(case, scale * (query.double() @ key.mT)),
        _capped(case, scale * unit_scores),
        sizes,
        value,
        torch.where((pages[:: case.pool] < 0)[None, :, None], 0.0, pools)[
            :, : visible // case.pool
        ],
    )


def _ranks(scores: Tensor, total: Tensor) -> Tensor:
    """[Hkv, n]: the largest over heads of score - total; a NaN counts for nothing."""
    return (scores - total[..., None]).nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1)


def _best(ranks: Tensor, among: Tensor, count: int) -> Tensor:
    """The first `count` in rank order of the indices `among`; ties to the lower."""
    order = among[torch.argsort(-ranks[among], stable=True)]
    return order[:count]


def unit_ranks(v: View) -> tuple[Tensor, Tensor]:
    """Ranks [Hkv, units] of all whole units, and the units that hold a candidate."""
    there = v.there[: v.unit_scores.shape[-1] * UNIT : UNIT]
    scores = v.unit_scores.masked_fill(~there, -torch.inf)
    ranks = _ranks(scores, torch.logsumexp(scores + math.log(UNIT), -1))
    return ranks, (v.candidates.nonzero()[:, 0] // UNIT).unique()


def shortlists(v: View) -> Tensor:
    """bool [Hkv, visible]: candidates of shortlisted units."""
    ranks, units = unit_ranks(v)
    short = torch.zeros(v.case.kv_heads, v.visible, dtype=torch.bool, device=ranks.device)
    unit_of = torch.arange(v.visible, device=ranks.device) // UNIT
    for h in range(v.case.kv_heads):
        best = _best(ranks[h], units, v.case.shortlist // UNIT)
        short[h] = torch.isin(unit_of, best) & v.candidates
    return short


def key_ranks(v: View, short: Tensor) -> Tensor:
    """[Hkv, visible]: logarithms of group masses, normalised by what was scored."""
    scored = (short | v.anyway) & v.there
    masked = v.key_scores.masked_fill(~scored[:, None], -torch.inf)
    return _ranks(v.key_scores, torch.logsumexp(masked, -1))


def lists(v: View, short: Tensor) -> list[Tensor]:
    """The tokens of every KV head, ascending."""
    ranks, found = key_ranks(v, short), []
    for h in range(v.case.kv_heads):
        order = _best(ranks[h], short[h].nonzero()[:, 0], v.visible)
        count = min(v.case.topk, len(order))
        if v.case.top_p is not None:
            mass = ranks[h][order].exp()
            rest = torch.nn.functional.pad(mass.flip(0).cumsum(0).flip(0), (0, 1))
            fits = rest <= 1 - as_float32(v.case.top_p)
            count = min(count, int(fits.int().argmax()))
        found.append(order[:count].sort()[0])
    return found


@dataclass(frozen=True)
class Rest:
    """What is left over of a sequence, for all heads."""

    weights: Tensor  # [Hkv, G, pools]: logarithms of what units that were not looked into weigh
    mass: Tensor  # [Hkv, G]: logarithm of all mass that is not attended


def rest_of(v: View, short: Tensor, listed: Tensor) -> Rest:
    whole = v.unit_scores.shape[-1] * UNIT
    pools = v.pool_values.shape[1]  # no candidate is after them
    unread = (v.candidates & ~short)[:, :whole].unflatten(-1, (-1, UNIT)).sum(-1)[:, None]
    units = torch.where(unread > 0, unread.log() + v.unit_scores, -torch.inf)
    scored = v.key_scores.masked_fill(~(short & ~listed)[:, None], -torch.inf)
    mass = torch.logsumexp(torch.cat([units, scored], -1), -1)
    per_pool = v.case.pool // UNIT
    weights = torch.logsumexp(units[..., : pools * per_pool].unflatten(-1, (pools, per_pool)), -1)
    return Rest(weights, mass)


@dataclass(frozen=True)
class Expected:
    """One query's result for all its heads [Hkv, G, ...] and its bounds."""

    out: Tensor
    lse: Tensor
    omitted: Tensor
    out_bound: Tensor
    lse_bound: Tensor
    finite: Tensor


def attend(v: View, listed: Tensor, rest: Rest | None, sinks: Tensor | None) -> Expected:
    """Attention over anchors, recent keys and `listed` (bool [Hkv, visible])."""
    case = v.case
    support = ((v.anyway | listed) & v.there)[:, None].expand_as(v.key_scores)
    terms = v.key_scores.masked_fill(~support, -torch.inf)
    values = torch.where(v.there[None, :, None], v.values, 0.0)
    omitted = torch.zeros_like(v.sizes)
    if rest is not None:
        kept = torch.logsumexp(terms, -1)
        omitted = torch.where(rest.mass == -torch.inf, 0.0, 1 / (1 + (kept - rest.mass).exp()))
    if rest is not None and case.far_field:
        terms = torch.cat([terms, rest.weights], -1)
        values = torch.cat([values, v.pool_values], 1)
    denominator = [terms]
    if sinks is not None and v.visible > 0:
        denominator.append(sinks.double().view(case.kv_heads, case.group, 1))
    else:
        denominator.append(torch.full_like(v.sizes, -torch.inf)[..., None])
    lse = torch.logsumexp(torch.cat(denominator, -1), -1)
    prob = torch.where(terms == -torch.inf, 0.0, (terms - lse[..., None]).exp())
    out, weight = prob @ values, prob @ values.abs()
    unit = UNIT_ROUNDOFF[case.dtype]
    size = v.sizes.clamp(min=case.softcap)
    accumulate = 2 * (case.head_dim + 4) * EPS * size[..., None] + (v.visible + 16) * EPS
    bound = unit * (weight + out.abs()) * (1 + 2 * unit) + accumulate * weight
    bound = bound + unit * torch.finfo(case.dtype).smallest_normal  # below it steps stay as wide
    lse_bound = 4 * EPS * (size + lse.abs().nan_to_num(posinf=0.0) + 16)
    return Expected(out, lse, omitted, bound, lse_bound, out.isfinite())


def expect(
    cache: Cache, token_lists: list[list[list[Tensor]]] | None = None, mode: str = "select"
) -> tuple[Reference, Tensor]:
    """The result of a call, [B, Hq, Lq, ...], and the omitted mass estimate.

    `mode` is "select", "dense" or "given"; `token_lists[b][i][h]` are the lists to attend, by
    default those of the definition.
    """
    case, parts = cache.case, []
    for b in range(len(cache.lengths)):
        for i in range(case.query_len):
            v = view(cache, b, i)
            shape = (case.kv_heads, v.visible)
            listed = torch.zeros(shape, dtype=torch.bool, device=cache.key.device)
            rest = None
            if mode == "dense" or (mode == "select" and v.dense):
                listed |= True
            else:
                short = shortlists(v) if mode == "select" else listed
                chosen = lists(v, short) if token_lists is None else token_lists[b][i]
                for h, tokens in enumerate(chosen):
                    listed[h, tokens.long()] = True
                if mode == "select":
                    rest = rest_of(v, short, listed)
            parts.append(attend(v, listed, rest, cache.sinks))
    shape = (len(cache.lengths), case.query_len, case.query_heads)

    def stack(name: str) -> Tensor:
        stacked = torch.stack([getattr(part, name).flatten(0, 1) for part in parts])
        return stacked.unflatten(0, shape[:2]).transpose(1, 2)

    names = ("out", "lse", "out_bound", "lse_bound", "finite")
    return Reference(*map(stack, names)), stack("omitted")


def lists_of(indices: Tensor, counts: Tensor) -> list[list[list[Tensor]]]:
    """The op's lists as [b][i][h] tensors, after a check of their form."""
    batch, heads, query_len, width = indices.shape
    assert indices.dtype == counts.dtype == torch.int32 and counts.shape == (
        batch, heads, query_len,
    )  # fmt: skip
    assert ((counts >= 0) & (counts <= width)).all()
    inside = torch.arange(width, device=indices.device) < counts[..., None]
    assert ((indices == -1) == ~inside).all(), "padded with -1 after the count"
    assert ((indices.diff(dim=-1) > 0) | ~inside[..., 1:]).all(), "strictly ascending"
    return [
        [[indices[b, h, i][: counts[b, h, i]] for h in range(heads)] for i in range(query_len)]
        for b in range(batch)
    ]


def with_lengths(cache: Cache, lengths: list[int]) -> Cache:
    """The same memory with other lengths."""
    changed = torch.tensor(lengths, dtype=torch.int32, device=cache.lengths.device)
    return replace(cache, lengths=changed)


# ---- Checks ----


def rank_tolerance(v: View) -> float:
    """How far ranks in float32 may be from float64."""
    size = float(v.sizes.clamp(min=v.case.softcap).max()) if v.sizes.numel() else 0.0
    return 4 * EPS * ((v.case.head_dim + 4) * size + 64)


def unit_tolerance(v: View) -> float:
    """The same for units, whose integer products are exact."""
    if v.case.centered:
        return rank_tolerance(v)
    largest = v.unit_scores.nan_to_num(0.0).abs().max() if v.unit_scores.numel() else 0.0
    return 16 * EPS * (float(largest) + 16)


def is_decided(cache: Cache) -> bool:
    """Are all shortlists the same in float32 and float64: no two units as good as equal at their
    ends, unless they are equal?"""
    for b in range(len(cache.lengths)):
        for i in range(cache.case.query_len):
            v = view(cache, b, i)
            ranks, units = unit_ranks(v)
            count = cache.case.shortlist // UNIT
            if v.dense or len(units) <= count:
                continue
            ordered = ranks[:, units].sort(dim=-1, descending=True)[0]
            gap = ordered[:, count - 1] - ordered[:, count]
            if ((gap > 0) & (gap < 2 * unit_tolerance(v))).any():
                return False
    return True


def build_decided(case: DecodeCase) -> Cache:
    """The case, or the first one after it whose shortlists are beyond doubt."""
    for seed in range(case.seed, case.seed + 20):
        cache = replace(case, seed=seed).build()
        if is_decided(cache):
            return cache
    raise AssertionError(f"no decided case from {case}")


def assert_list(v: View, h: int, short: Tensor, tokens: Tensor) -> None:
    """A list holds the best tokens of a shortlist, as far as float32 can tell."""
    case, tolerance = v.case, rank_tolerance(v)
    listed = torch.zeros_like(short[h])
    listed[tokens.long()] = True
    assert not (listed & ~short[h]).any(), "a token that is no candidate of the shortlist"
    ranks, rest = key_ranks(v, short)[h], short[h] & ~listed
    most = min(case.topk, int(short[h].sum()))
    if case.top_p is None:
        assert len(tokens) == most
    elif len(tokens) < most:
        left_out = float(ranks[rest].exp().sum())
        slack = 1e-5 + 2 * tolerance
        assert left_out <= 1 - case.top_p + slack, "the list is too short"
    if case.top_p is not None and len(tokens) > 0:
        worst = float(ranks[listed].min().exp())
        assert float(ranks[rest].exp().sum()) + worst > 1 - case.top_p - 1e-5 - 2 * tolerance
    if len(tokens) > 0 and rest.any():
        assert ranks[listed].min() >= ranks[rest].max() - tolerance, "a better token is left out"


def check_lists(cache: Cache, indices: Tensor, counts: Tensor) -> list[list[list[Tensor]]]:
    """Asserts form and order of all lists of a decided cache, and returns them."""
    found = lists_of(indices, counts)
    for b, of_queries in enumerate(found):
        for i, of_heads in enumerate(of_queries):
            v = view(cache, b, i)
            short = shortlists(v)
            for h, tokens in enumerate(of_heads):
                assert_list(v, h, short, tokens)
    return found


def check_attention(cache: Cache, run: dict[str, Tensor]) -> float:
    """Asserts out, lse and the omitted mass of a decided cache against lists of the op's own;
    returns the largest share of the bound that was used."""
    found = check_lists(cache, run["indices"], run["counts"])
    reference, omitted = expect(cache, found)
    used = assert_matches(reference, run["out"], run["lse"])
    slack = 8 * reference.lse_bound.clamp(max=1.0)
    finite = reference.lse.isfinite()
    assert ((run["omitted"].double() - omitted).abs() <= slack)[finite].all(), "omitted mass"
    assert (run["omitted"][reference.lse == -torch.inf] == 0).all()
    return used


def run_all(cache: Cache) -> dict[str, Tensor]:
    """Attention with its lists, each by its op."""
    out, lse, omitted = attention_with_kvcache(
        *cache.tensors, **cache.args, return_lse=True, return_estimate=True
    )
    indices, counts = select_tokens_with_kvcache(*cache.tensors, **cache.select_args)
    return {"out": out, "lse": lse, "omitted": omitted, "indices": indices, "counts": counts}
