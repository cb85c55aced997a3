"""The definition of docs/definition.md as boolean masks: who attends what, who may be listed.

Everything is written from the sets in that page, by brute force over (query, key) pairs; nothing
here mirrors the arithmetic of the C++ headers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK_KEYS = 64
SHORT, COARSE = 8, 64  # keys per unit of "block"
LEVELS = {"block": (SHORT, COARSE), "quest": (16,), "mean": (64,)}  # in a block's order
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def tile_positions(group: int) -> int:
    """Positions of a tile: the largest power of two P <= 64 with P * group <= 128."""
    return max(p for p in (1, 2, 4, 8, 16, 32, 64) if p == 1 or p * group <= 128)


def pool_size(group: int) -> int:
    """Consecutive queries of a tile that are averaged into one pooled query."""
    return min(8, tile_positions(group))


def scan_tiles(kv_len: int) -> int:
    """Consecutive tiles that share a scan and its shortlist, for selector "block"."""
    return 1 if kv_len <= 2**18 else 2 if kv_len <= 2**19 else 4 if kv_len <= 2**20 else 8


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Budget:
    """How much a list may hold."""

    topk: int  # keys
    top_p: float | None = None
    per_head: tuple[int, ...] | None = None  # keys of every KV head

    @property
    def width(self) -> int:
        """Blocks of the longest list."""
        return self.topk // BLOCK_KEYS

    def of_heads(self, kv_heads: int, device: str | torch.device) -> Tensor:
        """[Hkv, 1]: K of every KV head, for the tiles of each."""
        keys = (self.topk,) * kv_heads if self.per_head is None else self.per_head
        blocks = [min(max(k, 0), self.topk) // BLOCK_KEYS for k in keys]
        return torch.tensor(blocks, device=device)[:, None]


@dataclass(frozen=True)
class Ranges:
    """Lengths and ranges of a call: the part of a support that does not depend on content."""

    query_len: int
    kv_len: int
    window: int
    anchors: int
    causal: bool
    device: str = "cpu"

    def _grid(self) -> tuple[Tensor, Tensor]:
        i = torch.arange(self.query_len, device=self.device)
        j = torch.arange(self.kv_len, device=self.device)
        return (i + self.kv_len - self.query_len)[:, None], j[None, :]

    def visible(self) -> Tensor:
        """[Lq, Lk]: may query i attend key j at all?"""
        p, j = self._grid()
        return j <= p if self.causal else torch.ones_like(j <= p)

    def always(self) -> Tensor:
        """[Lq, Lk]: visible keys that are anchors or in the window, whatever is selected."""
        p, j = self._grid()
        in_window = (j > p - self.window) & (j < p + self.window)
        return self.visible() & ((j < self.anchors) | in_window)

    def candidates(self) -> Tensor:
        """[Lq, Lk]: visible keys that only selection can add."""
        return self.visible() & ~self.always()

    def dense_is_faster(self, topk: int) -> bool:
        """Does a block selector attend everything, the average query seeing few keys more?"""
        attended = self.anchors + self.window * (1 if self.causal else 2) + topk
        unseen = min(self.query_len, self.kv_len) // 2 if self.causal else 0
        return self.kv_len >= 1024 and 4 * (self.kv_len - unseen) <= 5 * attended

    def eligible(self, group: int) -> Tensor:
        """[T, blocks]: may a list of the tile name the block?"""
        return self._any_of_tile(self.candidates(), group)

    def beside(self, group: int) -> Tensor:
        """[T, blocks]: does the block hold anchors or window keys of some query of the tile?"""
        return self._any_of_tile(self.always(), group)

    def seen_by_all(self, group: int) -> Tensor:
        """[T, blocks]: does every query of the tile see every key of the block?"""
        return ~self._any_of_tile(~self.visible(), group)

    def _any_of_tile(self, pairs: Tensor, group: int) -> Tensor:
        tile = torch.arange(self.query_len, device=self.device) // tile_positions(group)
        tiles = ceil_div(self.query_len, tile_positions(group))
        blocks = ceil_div(self.kv_len, BLOCK_KEYS)
        filled = pad(pairs, (0, blocks * BLOCK_KEYS - self.kv_len))
        of_query = filled.unflatten(1, (blocks, BLOCK_KEYS)).any(-1)
        hits = torch.zeros(tiles, blocks, dtype=torch.float64, device=self.device)
        return hits.index_add_(0, tile, of_query.double()) > 0


def listed_blocks(indices: Tensor, counts: Tensor, kv_len: int) -> tuple[Tensor, Tensor]:
    """Valid entries of lists: bool [B, Hkv, T, blocks], and whether any content was invalid.

    Entries that are negative, out of range or not greater than the valid ones before them are
    skipped; counts are clamped to the width of the lists.
    """
    width, blocks = indices.shape[-1], ceil_div(kv_len, BLOCK_KEYS)
    clamped = counts.clamp(0, width)
    invalid = clamped != counts
    listed = torch.zeros(*counts.shape, blocks + 1, dtype=torch.bool, device=indices.device)
    last = torch.full_like(counts, -1)
    for entry in range(width):
        block = indices[..., entry]
        used = entry < clamped
        valid = used & (block > last) & (block < blocks)
        invalid |= used & ~valid
        last = torch.where(valid, block, last)
        slot = torch.where(valid, block, torch.full_like(block, blocks)).long()
        listed.scatter_(-1, slot[..., None], True)
    return listed[..., :blocks], invalid.any()


def spread_to_rows(per_tile: Tensor, query_heads: int, query_len: int) -> Tensor:
    """[B, Hkv, T, X] of tiles -> [B, Hq, Lq, X] of rows."""
    group = query_heads // per_tile.shape[1]
    tile = torch.arange(query_len, device=per_tile.device) // tile_positions(group)
    return per_tile[:, :, tile].repeat_interleave(group, dim=1)


def support_of_lists(ranges: Ranges, listed: Tensor, query_heads: int) -> Tensor:
    """bool [B, Hq, Lq, Lk]: anchors, window and every visible key of the listed blocks."""
    keys = listed.repeat_interleave(BLOCK_KEYS, dim=-1)[..., : ranges.kv_len]
    rows = spread_to_rows(keys, query_heads, ranges.query_len)
    return ranges.visible() & (ranges.always() | rows)


def support_of_pairs(ranges: Ranges, scores: Tensor, threshold: Tensor, tie: Tensor) -> Tensor:
    """bool [B, Hq, Lq, Lk]: anchors, window and the keys that a (threshold, tie index) selects."""
    j = torch.arange(ranges.kv_len, device=scores.device)
    limit = threshold[..., None].to(scores.dtype)
    chosen = (scores > limit) | ((scores == limit) & (j <= tie[..., None]))
    return ranges.always() | (ranges.candidates() & chosen)
