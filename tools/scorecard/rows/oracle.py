"""Random calls against tools/scorecard/definition.py, which was written from the docs alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import condensate_ext as ops
import numpy as np
import torch
from torch import Tensor

from tools.scorecard import definition as by
from tools.scorecard.line import Line, Piece, Tally

CALLS = {"reduced": 15, "full": 50}  # a piece
Array = Any  # a numpy.ndarray


@dataclass(frozen=True)
class Call:
    """A random call; `tensors` makes its content."""

    seed: int
    device: str
    dtype: torch.dtype
    batch: int
    kv_heads: int
    group: int
    query_len: int
    kv_len: int
    head_dim: int
    window: int
    anchors: int
    topk: int
    causal: bool
    far_field: bool
    selector: str
    top_p: float | None
    per_head: tuple[int, ...] | None
    scale: float

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        heads = self.kv_heads * self.group
        shapes = [(heads, self.query_len)] + [(self.kv_heads, self.kv_len)] * 2
        made = []
        for place, (count, length) in enumerate(shapes):
            shape = (self.batch, count, length, self.head_dim)
            content = torch.randn(shape, generator=generator)
            if self.selector == "exact" and place < 2:  # scores are exact, and many are equal
                content = torch.randint(-2, 3, shape, generator=generator).float()
            made.append(content.to(self.device, self.dtype))
        return made[0], made[1], made[2]

    def ranges(self) -> dict[str, Any]:
        return {
            "window": self.window, "anchors": self.anchors, "causal": self.causal,
            "scale": self.scale,
        }  # fmt: skip

    def budget(self) -> dict[str, Any]:
        per_head = self.per_head and torch.tensor(
            self.per_head, dtype=torch.int32, device=self.device
        )
        return {
            "topk": self.topk, "selector": self.selector, "topk_per_head": per_head,
            "top_p": self.top_p,
        }  # fmt: skip

    def blocks_of(self, kv_head: int) -> int:
        if self.per_head is None:
            return self.topk // 64
        return min(max(self.per_head[kv_head], 0), self.topk) // 64


def draw(rng: random.Random, device: str) -> Call:
    selector = rng.choice(["block"] * 4 + ["quest", "mean", "exact"])
    single = rng.random() < 0.3
    deep = selector != "exact" and rng.random() < 0.05  # pools of several blocks
    kv_len = rng.choice([1, 63, 64, 65, 200, 511, 512, 513, rng.randint(1, 1500)])
    kv_len = rng.randint(8193, 9000) if deep and not single else kv_len
    kv_heads, head_dim = rng.choice([1, 1, 2]), rng.choice([8, 16, 32, 64, 64, 72, 128])
    lists = selector != "exact"
    per_head = tuple(rng.choice([-5, 0, 63, 64, 130, 2**31 - 1]) for _ in range(kv_heads))
    return Call(
        seed=rng.randrange(2**31), device=device,
        dtype=rng.choice([torch.float32, torch.float16, torch.bfloat16]),
        batch=rng.choice([1, 1, 2]), kv_heads=kv_heads, group=rng.choice([1, 2, 3, 4, 8, 16]),
        query_len=1 if single else rng.choice([2, 7, 8, 9, 63, 64, 65, rng.randint(2, 130)]),
        kv_len=kv_len, head_dim=head_dim, window=rng.choice([0, 1, 2, 17, 64, 65, 150]),
        anchors=rng.choice([0, 1, 5, 63, 64, 65, 130]),
        topk=64 * rng.choice([0, 1, 2, 3, 9]) if lists else rng.choice([0, 1, 7, 64, 100]),
        causal=rng.random() < 0.7, far_field=lists and rng.random() < 0.6, selector=selector,
        top_p=rng.choice([0.1, 0.5, 0.9, 1.0]) if lists and rng.random() < 0.3 else None,
        per_head=per_head if lists and rng.random() < 0.2 else None,
        scale=2.0**-5 if not lists else rng.choice([1.0, 1.0, 0.3, 2.5]) * head_dim**-0.5,
    )  # fmt: skip


def numbers(tensor: Tensor) -> Array:
    return tensor.cpu().double().numpy()


def head_of(call: Call, qkv: list[Array], b: int, kv: int) -> by.Head:
    heads = slice(kv * call.group, (kv + 1) * call.group)
    return by.Head(
        qkv[0][b, heads], qkv[1][b, kv], qkv[2][b, kv], call.window, call.anchors, call.causal,
        call.scale, call.dtype,
    )  # fmt: skip


def check_summaries(call: Call, head: by.Head, summaries: Array, selector: str) -> str:
    """Means within rounding, bounds exact."""
    for keys, rows in by.unpack(summaries, selector, head.blocks).items():
        count = -(-call.kv_len // keys)
        if np.any(rows[count:]):
            return "a summary unit without keys is not 0"
        if selector == "quest":
            parts = [head.k[b : b + keys] for b in range(0, call.kv_len, keys)]
            made = np.array([np.concatenate([x.max(0), x.min(0)]) for x in parts])
            if np.any(made != rows[:count]):
                return "bounds of units are wrong"
            continue
        sizes = by.unit_means(np.abs(head.k), keys)
        limit = by.UNIT[call.dtype] * sizes + 70 * by.EPS * sizes + 1e-7
        if np.any(np.abs(by.unit_means(head.k, keys) - rows[:count]) > limit):
            return f"means of {keys} keys are wrong"
    return ""


def check_list(
    call: Call, k: int, eligible: Array, masses: Array, indices: Array, count: int
) -> str:
    """A tile's list against the masses of its eligible blocks."""
    entries = indices[:count]
    if np.any(indices[count:] != -1) or np.any(np.diff(entries) <= 0):
        return "a list is not ascending and padded with -1"
    if not np.isin(entries, np.flatnonzero(eligible)).all():
        return "a listed block is not eligible"
    total = int(eligible.sum())
    if total <= k:
        return "" if count == total else f"{count} of {total} eligible blocks, which all fit"
    listed = np.zeros(len(eligible), bool)
    listed[entries] = True
    others = masses[eligible & ~listed]
    near = 2e-4 + 40 * by.EPS * call.head_dim
    if count and len(others) and masses[listed].min() < others.max() * (1 - near) - 1e-12:
        return "a heavier block is not listed"
    if call.top_p is None:
        return "" if count == k else f"{count} blocks, expected {k}"
    heaviest = np.sort(masses[eligible])[::-1][:k]
    cut = heaviest[count:].sum()
    if cut > (1 - call.top_p) * (1 + near) + 1e-6:
        return f"the list leaves out {cut}, top_p is {call.top_p}"
    more = cut + (heaviest[count - 1] if count else 0)
    if count and more < (1 - call.top_p) * (1 - near) - 1e-6:
        return f"the list could be shorter: {more}, top_p is {call.top_p}"
    return ""


def check_rows(made: by.Attended, out: Array, lse: Array, words: str) -> str:
    if np.any(np.isfinite(lse) != np.isfinite(made.lse)):
        return f"{words}: rows without keys differ"
    rows = np.isfinite(made.lse)
    off = np.abs(lse[rows] - made.lse[rows])
    if np.any(off > made.lse_bound[rows]):
        return f"{words}: log-sum-exp off by {off.max()}"
    if np.any(np.abs(out - made.out) > made.out_bound + 1e-30):
        return f"{words}: output off by {(np.abs(out - made.out) / (made.out_bound + 1e-30)).max()}"
    return ""


class BlockCheck:
    """One call with lists: summaries, lists, both attentions, the estimate."""

    def __init__(self, call: Call) -> None:
        self.call = call
        query, key, value = call.tensors()
        self.qkv = [numbers(t) for t in (query, key, value)]
        selector: Any = call.selector
        units = ops.block_summaries(key, selector=selector)
        common = {**call.ranges(), **call.budget(), "far_field": call.far_field}
        lists = ops.select_blocks(query, units, key, kv_len=call.kv_len, **common)
        given = ops.block_sparse_attention(
            query,
            key,
            value,
            *lists,
            far_field=call.far_field,
            **call.ranges(),
        )
        whole = ops.attention_forward(query, key, value, **common)
        self.units, self.indices, self.counts = map(numbers, (units, *lists))
        self.given, self.whole = [numbers(t) for t in given], [numbers(t) for t in whole]
        means = [ops.block_summaries(t, selector="mean") for t in (key, value)]
        self.means = [numbers(t) for t in means]

    def run(self) -> str:
        for b in range(self.call.batch):
            for kv in range(self.call.kv_heads):
                words = self.head(b, kv)
                if words:
                    return words
        return ""

    def head(self, b: int, kv: int) -> str:
        call = self.call
        head = head_of(call, self.qkv, b, kv)
        units = self.units[b, kv]
        words = check_summaries(call, head, units, call.selector)
        for tile, queries in enumerate(head.tiles):
            words = words or self.tile(head, b, kv, tile, queries)
        return words

    def tile(self, head: by.Head, b: int, kv: int, tile: int, queries: Array) -> str:
        call = self.call
        eligible = head.eligible(queries, call.far_field)
        found = by.scan(head, queries, self.units[b, kv], call.selector)
        masses, refined = found.masses, call.query_len == 1 and call.selector == "block"
        if refined:
            walked = eligible | head.range_blocks(queries)
            masses, keys = by.key_masses(head, found, walked)
        count, k = int(self.counts[b, kv, tile]), call.blocks_of(kv)
        indices = self.indices[b, kv, tile].astype(int)
        if eligible.sum() <= 64:  # else the shortlist decides too
            words = check_list(call, k, eligible, masses, indices, count)
            if words:
                return f"{words} (head {kv}, tile {tile})"
        listed = np.zeros(head.blocks, bool)
        listed[indices[:count]] = True
        means = tuple(m[b, kv] for m in self.means)
        made = by.attend(
            head, queries, by.support(head, queries, listed, call.far_field, means), listed
        )
        heads = slice(kv * call.group, (kv + 1) * call.group)
        rows = [t[b, heads][:, queries] for t in (*self.given, *self.whole)]
        out, lse, *whole = rows
        words = check_rows(made, out, lse, "block_sparse_attention")
        if not (call.far_field and call.query_len > 1):
            walked = listed | head.range_blocks(queries)
            made.estimate = (
                by.key_estimate(head, keys, walked)
                if refined
                else by.selection_estimate(head, found, walked)
            )
            made.estimate_bound = 1e-4 + 1e-3 * made.estimate
            if refined and eligible.sum() > 64:
                made.estimate_bound[:] = 1
        return words or self.forward(head, queries, listed, made, whole)

    def forward(
        self, head: by.Head, queries: Array, listed: Array, made: by.Attended, whole: list[Array]
    ) -> str:
        """attention_forward of the same call: everything, or what the lists give."""
        call = self.call
        out, lse, estimate = whole
        if np.any(estimate < 0) or np.any(estimate > 1):
            return "an estimate is no share"
        if self.attends_all():
            window = by.Head(
                head.q, head.k, head.v, max(call.query_len, call.kv_len), 0, call.causal,
                call.scale, call.dtype,
            )  # fmt: skip
            made = by.attend(
                window, queries, by.support(window, queries, listed, False, ()), listed
            )
            words = check_rows(made, out, lse, "attention_forward of everything")
            return words or ("an estimate is not 0" if np.any(estimate) else "")
        words = check_rows(made, out, lse, "attention_forward")
        off = np.abs(estimate - made.estimate)
        if np.any(off > made.estimate_bound):
            at = np.unravel_index((off - made.estimate_bound).argmax(), off.shape)
            words = words or f"estimate {estimate[at]}, expected {made.estimate[at]}"
        return words

    def attends_all(self) -> bool:
        """Does the budget reach every key, or would selecting not be faster?"""
        call = self.call
        if call.per_head is not None:
            return False
        last = call.kv_len - 1 - (call.window if call.causal else 0)
        outside = last // 64 - call.anchors // 64 + 1 if last >= call.anchors else 0
        if call.topk // 64 >= outside:
            return True
        if call.kv_len < 1024:
            return False
        window = call.window if call.causal else 2 * call.window
        seen = call.kv_len
        if call.causal:
            seen -= min(call.query_len, call.kv_len) // 2
        return 4 * seen <= 5 * (call.anchors + window + call.topk)


def check_exact(call: Call) -> str:
    """Integer contents: the selected set is known exactly, ties to the lower index."""
    query, key, value = call.tensors()
    qkv = [numbers(t) for t in (query, key, value)]
    results = ops.attention_forward(
        query,
        key,
        value,
        topk=call.topk,
        selector="exact",
        **call.ranges(),
    )
    out, lse, estimate = map(numbers, results)
    nothing = np.zeros(-(-call.kv_len // 64), bool)
    for b in range(call.batch):
        for kv in range(call.kv_heads):
            head = head_of(call, qkv, b, kv)
            queries = np.arange(call.query_len)
            ranged, visible = head.ranged(queries), head.visible(queries)
            for g in range(call.group):
                one = by.Head(
                    head.q[g : g + 1], head.k, head.v, call.window, call.anchors, call.causal,
                    call.scale, call.dtype,
                )  # fmt: skip
                scores = np.where(visible & ~ranged, call.scale * head.q[g] @ head.k.T, -np.inf)
                order = np.argsort(-scores, axis=1, kind="stable")[:, : call.topk]
                chosen = np.zeros_like(ranged)
                np.put_along_axis(chosen, order, True, 1)
                attended = ranged | (chosen & (scores > -np.inf))
                made = by.attend(one, queries, by.Support(attended), nothing)
                place = (b, kv * call.group + g)
                words = check_rows(made, out[place][None], lse[place][None], "exact")
                if words:
                    return words
                full = by.attend(one, queries, by.Support(visible), nothing)
                with np.errstate(invalid="ignore"):
                    omitted = np.nan_to_num(1 - np.exp(made.lse - full.lse))
                if np.any(np.abs(omitted[0] - estimate[place]) > 1e-4):
                    return f"exact: estimate off by {np.abs(omitted[0] - estimate[place]).max()}"
    return ""


def run(piece: Piece) -> Tally:
    tally, rng = Tally(), piece.rng()
    for _ in range(CALLS[piece.size]):
        call = draw(rng, piece.device)
        try:
            words = check_exact(call) if call.selector == "exact" else BlockCheck(call).run()
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
        tally.check(not words, f"{words}: {call}")
    return tally


LINE = Line(
    "independent oracle",
    "calls",
    "2,000, 0 wrong",
    {"reduced": 1, "full": 40},
    run,
    why="Summaries, lists, outputs, log-sum-exps and estimates against a second definition in "
    "numpy and float64, written from docs/definition.md alone.",
)
