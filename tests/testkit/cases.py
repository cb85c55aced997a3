"""Seeded random calls: one integer gives one call, on any device, with the same content."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.testkit.definition import (
    BLOCK_KEYS,
    DTYPES,
    Budget,
    Ranges,
    ceil_div,
    tile_positions,
)
from tests.testkit.poison import LAYOUTS, embed

MAX_SCORES = 1 << 20  # B * Hq * Lq * Lk of a random case
MAX_LENGTH = 2**31 - 1  # of windows, anchors and sequences
INTEGER_SCALE = 2.0**-5  # keeps integer scores exact and their exponentials in float16's range


@dataclass(frozen=True)
class Case:
    """A call with everything that decides its content; the defaults are a small plain one."""

    device: str = "cpu"
    seed: int = 0
    dtype: torch.dtype = torch.float32
    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    query_len: int = 128
    kv_len: int = 128
    head_dim: int = 64
    window: int = 32
    anchors: int = 8
    topk: int = 64
    top_p: float | None = None
    topk_per_head: tuple[int, ...] | None = None
    causal: bool = True
    scale: float | None = None
    far_field: bool = False
    selector: str = "lists"  # of the ops, or "lists" and "hostile": the caller gives lists
    content: str = "normal"  # or "integers": small ones in query and key
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")

    @property
    def query_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def ranges(self) -> Ranges:
        return Ranges(
            self.query_len, self.kv_len, self.window, self.anchors, self.causal, self.device
        )

    @property
    def range_args(self) -> dict[str, object]:
        return {
            "window": self.window,
            "anchors": self.anchors,
            "causal": self.causal,
            "scale": self.scale,
        }

    @property
    def budget(self) -> Budget:
        return Budget(self.topk, self.top_p, self.topk_per_head)

    @property
    def selection_args(self) -> dict[str, object]:
        """The selector and its budget."""
        per_head = self.topk_per_head
        if per_head is not None:
            per_head = torch.tensor(per_head, dtype=torch.int32, device=self.device)
        return {
            "selector": self.selector,
            "topk": self.topk,
            "topk_per_head": per_head,
            "top_p": self.top_p,
        }

    @property
    def attention_args(self) -> dict[str, object]:
        """range_args for the ops that attend."""
        return {**self.range_args, "far_field": self.far_field}

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """query, key, value in their layouts."""
        made = []
        shapes = [(self.query_heads, self.query_len)] + [(self.kv_heads, self.kv_len)] * 2
        for index, ((heads, length), layout) in enumerate(zip(shapes, self.layouts, strict=True)):
            shape = (self.batch, heads, length, self.head_dim)
            generator = torch.Generator().manual_seed(self.seed * 4 + index)
            if self.content == "integers" and index < 2:
                content = torch.randint(-2, 3, shape, generator=generator).float()
            else:
                content = torch.randn(shape, generator=generator)
            made.append(embed(content.to(self.dtype).to(self.device), layout))
        return made[0], made[1], made[2]

    def lists(self) -> tuple[Tensor, Tensor]:
        """Lists of the caller: valid ones, or garbage when the case is hostile."""
        generator = torch.Generator().manual_seed(self.seed * 4 + 3)
        tiles = ceil_div(self.query_len, tile_positions(self.group))
        lead = (self.batch, self.kv_heads, tiles)
        blocks, width = ceil_div(self.kv_len, BLOCK_KEYS), self.topk // BLOCK_KEYS
        if self.selector == "hostile":
            indices, counts = hostile_lists(lead, width, blocks, generator)
        else:
            indices, counts = random_lists(lead, width, blocks, generator)
        return indices.to(self.device), counts.to(self.device)


def random_lists(
    lead: tuple[int, ...], width: int, blocks: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ascending lists of distinct blocks with random counts, padded with -1."""
    most = min(width, blocks)
    counts = torch.randint(0, most + 1, lead, generator=generator)
    order = torch.rand(*lead, blocks, generator=generator).argsort(-1)[..., :most]
    used = torch.arange(most) < counts[..., None]
    ascending = torch.where(used, order, blocks).sort(-1).values
    indices = torch.full((*lead, width), -1)
    indices[..., :most] = torch.where(ascending < blocks, ascending, -1)
    return indices.int(), counts.int()


def hostile_lists(
    lead: tuple[int, ...], width: int, blocks: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Garbage: any int32, blocks just out of range, repeated and falling blocks, wild counts."""
    limit = 2**31 - 1
    wild = torch.randint(-limit - 1, limit, (*lead, width), generator=generator)
    near = torch.randint(-2, blocks + 2, (*lead, width), generator=generator)
    pick = torch.rand(*lead, width, generator=generator)
    indices = torch.where(pick < 0.3, wild, near)
    wild_counts = torch.randint(-limit - 1, limit, lead, generator=generator)
    near_counts = torch.randint(-1, width + 2, lead, generator=generator)
    pick = torch.rand(*lead, generator=generator)
    return indices.int(), torch.where(pick < 0.3, wild_counts, near_counts).int()


def from_seed(seed: int, device: str) -> Case:
    """The random case of a seed: edges of everything more often than the middle."""
    rng = random.Random(seed)
    selector = rng.choices(
        ["lists", "hostile", "block", "quest", "mean", "exact"], [5, 2, 5, 1, 1, 3]
    )[0]
    given = selector in ("lists", "hostile")
    # A selector has work to do only where its budget and the ranges are short for the keys.
    tight = not given and rng.random() < 0.75
    far_field = selector != "exact" and rng.random() < 0.5
    # Above 128 blocks the pools of the far field hold more than one.
    deep = far_field and rng.random() < 0.15
    # A single query's list is refined; above 64 eligible blocks its scan has a shortlist to make.
    single = tight and selector == "block" and rng.random() < 0.5
    long = tight and selector == "block" and rng.random() < 0.5
    group = rng.choice([1, 1, 2, 3, 4, 4, 5, 7, 8, 8, 12, 16, 32, 64])
    query_len, kv_len = _length(rng), rng.randint(300, 1500) if tight else _length(rng, 700)
    kv_len = rng.randint(66 * BLOCK_KEYS, 100 * BLOCK_KEYS) if long else kv_len
    kv_len = rng.randint(128 * BLOCK_KEYS, 300 * BLOCK_KEYS) if deep else kv_len
    query_len = 1 if single else query_len
    if rng.random() < 0.4:
        query_len = min(query_len, kv_len)
    kv_heads, batch = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3])
    # An exact case costs kv_len / head_dim calls, which read its support off.
    limit = MAX_SCORES // 8 if selector == "exact" else MAX_SCORES
    while batch * kv_heads * group * query_len * kv_len > limit:
        batch, kv_heads, query_len = max(1, batch - 1), max(1, kv_heads - 1), query_len * 2 // 3
    integers = selector == "exact" and rng.random() < 0.5
    head_dim = rng.choice([8, 16, 24, 32, 40, 64, 64, 72, 80, 96, 128, 128, 192, 200, 248, 256])
    head_dim = min(head_dim, 64) if integers else head_dim
    window = rng.choice(
        [0, 1, 2, 17, 63, 64, 65, 100, 129] + [256, kv_len, MAX_LENGTH] * (not tight)
    )
    anchors = rng.choice([0, 0, 1, 5, 63, 64, 65] + [130, kv_len, MAX_LENGTH] * (not tight))
    topk = rng.choice([1, 2, 3, 5] if tight else [0, 1, 2, 3, 5, 9])
    if far_field and (long or deep):  # also more listed blocks than the estimate samples
        topk = rng.choice([topk, 8, 9, 20])
    lists_blocks = selector in ("block", "quest", "mean")
    top_p = rng.choice([0.1, 0.3, 0.5, 0.8, 0.9, 0.99, 1.0, rng.random()])
    per_head = tuple(
        rng.choice([-(2**31), -1, 0, 63, 64, 65, 130, 200, 2**31 - 1]) for _ in range(kv_heads)
    )
    scales = [None, 0.25 / head_dim**0.5] + [2 / head_dim**0.5] * (selector != "exact")
    return Case(
        device=device,
        seed=seed,
        dtype=rng.choice(DTYPES),
        batch=batch,
        kv_heads=kv_heads,
        group=group,
        query_len=query_len,
        kv_len=kv_len,
        head_dim=head_dim,
        window=window,
        anchors=anchors,
        topk=topk * rng.choice([1, 13, 40]) if selector == "exact" else topk * BLOCK_KEYS,
        top_p=top_p if lists_blocks and rng.random() < 0.3 else None,
        topk_per_head=per_head if lists_blocks and rng.random() < 0.3 else None,
        causal=rng.random() < 0.7,
        far_field=far_field,
        scale=INTEGER_SCALE if integers else rng.choice(scales),
        selector=selector,
        content="integers" if integers else "normal",
        layouts=(rng.choice(LAYOUTS), rng.choice(LAYOUTS), rng.choice(LAYOUTS)),
    )


def _length(rng: random.Random, longest: int = 400) -> int:
    edge = rng.choice([0, 16, 32, 64, 128, 192, 256])
    pick = rng.random()
    if pick < 0.5:
        return max(0, edge + rng.choice([-1, 0, 1]))
    return rng.choice([1, 2, 3]) if pick < 0.6 else rng.randint(1, longest)
