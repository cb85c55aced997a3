"""What is measured: shapes, budgets, and the work that any implementation of them must do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK_KEYS = 64
SHORT, COARSE = 8, 1  # summary units of a block, selector="block"
SUMMARY_ROWS = SHORT + COARSE
QUERY_POOL = 8  # consecutive queries that are averaged, at most
SCAN_KEYS, MOST_SCAN_TILES = 262144, 8  # keys up to which a tile scans alone; tiles of one scan


@dataclass(frozen=True)
class Case:
    """Causal prefill of `n` tokens, batch 1, with selector="block"."""

    n: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    window: int = 256
    anchors: int = 64
    topk: int = 1728
    given_lists: bool = False  # random lists for the list-given stages, none selected
    flex: bool = True  # FlexAttention compiles anew for every shape, so not everywhere

    @property
    def name(self) -> str:
        length = f"{self.n // 1024}K"
        shape = f"h{self.heads}kv{self.kv_heads}d{self.head_dim}"
        return f"prefill_{length}_{shape}_{self.budget}keys"

    @property
    def budget(self) -> int:
        """Keys per query of a row that is far from the start."""
        return self.window + self.anchors + self.topk

    @property
    def max_blocks(self) -> int:
        return self.topk // BLOCK_KEYS

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def tile_positions(self) -> int:
        """Consecutive positions that share a list (docs/definition.md, Tiles)."""
        positions = 64
        while positions > 1 and positions * self.group > 128:
            positions //= 2
        return positions

    @property
    def scan_tiles(self) -> int:
        """Consecutive tiles that share a scan."""
        tiles = 1
        while tiles < MOST_SCAN_TILES and self.n > tiles * SCAN_KEYS:
            tiles *= 2
        return tiles

    @property
    def pooled_queries(self) -> int:
        """Averaged queries of a tile, as many as of a scan tile."""
        return self.tile_positions * self.group // min(QUERY_POOL, self.tile_positions)

    @property
    def shortlist_width(self) -> int:
        return max(64, 2 * self.max_blocks)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def element_bytes(self) -> int:
        return self.torch_dtype.itemsize

    @property
    def query_bytes(self) -> int:
        return self.n * self.heads * self.head_dim * self.element_bytes

    @property
    def kv_bytes(self) -> int:
        """K and V together."""
        return 2 * self.n * self.kv_heads * self.head_dim * self.element_bytes


@dataclass(frozen=True)
class Work:
    """The least that a stage must compute and move: every input read once, every output written."""

    flops: float
    num_bytes: float


def attention_work(case: Case, keys_per_query: float) -> Work:
    """Both matrix products over the attended keys; Q, K, V in and the output out."""
    flops = 4.0 * case.n * keys_per_query * case.heads * case.head_dim
    return Work(flops, 2 * case.query_bytes + case.kv_bytes)


def dense_work(case: Case) -> Work:
    return attention_work(case, (case.n + 1) / 2)


def summary_work(case: Case) -> Work:
    """Every key added into its short unit, those into coarse ones."""
    additions = 1 + SHORT / BLOCK_KEYS
    key_bytes = case.kv_bytes / 2
    return Work(
        additions * case.n * case.kv_heads * case.head_dim,
        key_bytes * (1 + SUMMARY_ROWS / BLOCK_KEYS),
    )


def eligible_blocks(case: Case, last: int) -> int:
    """Blocks that a tile whose last position is `last` may list."""
    before_window = (last - case.window) // BLOCK_KEYS + 1
    return max(0, before_window - case.anchors // BLOCK_KEYS)


def scan_scores(case: Case, last: int) -> float:
    """Scores of the scan of one scan tile, none where all its blocks can be taken."""
    taken = case.max_blocks if case.scan_tiles == 1 else case.shortlist_width
    if eligible_blocks(case, last) <= taken:
        return 0.0
    return case.pooled_queries * (last + 1) / BLOCK_KEYS * (SHORT + COARSE)


def refinement_scores(case: Case, last: int) -> float:
    """Scores of the refinement of one tile, none where the scan makes its list or all its blocks
    can be listed."""
    eligible = eligible_blocks(case, last)
    if case.scan_tiles == 1 or eligible <= case.max_blocks:
        return 0.0
    # Whole blocks of anchors and window beside the shortlist, as far as there are any.
    beside = (case.anchors + case.window) / BLOCK_KEYS
    walked = min(min(case.shortlist_width, eligible) + beside, (last + 1) / BLOCK_KEYS)
    return case.pooled_queries * walked * SHORT


def ends(case: Case, tiles: int) -> range:
    """Last positions of every so many tiles."""
    positions = tiles * case.tile_positions
    return range(positions - 1, case.n, positions)


def selection_work(case: Case) -> Work:
    """Pooled queries against all visible units and, where tiles share a scan, against the short
    units of their shortlist; queries and summaries in, lists out."""
    scores = sum(scan_scores(case, last) for last in ends(case, case.scan_tiles))
    scores += sum(refinement_scores(case, last) for last in ends(case, 1))
    scores *= case.kv_heads
    lists = case.n / case.tile_positions * case.kv_heads * (case.max_blocks + 1) * 4
    summaries = case.kv_bytes / 2 * SUMMARY_ROWS / BLOCK_KEYS
    return Work(2.0 * scores * case.head_dim, case.query_bytes + summaries + lists)


# The order is that of importance: what comes last is skipped first when time runs out.
SEED_ROW = Case(
    131072, heads=12, kv_heads=12, head_dim=64, dtype="float16",
    window=32, anchors=1, topk=64, given_lists=True,
)  # fmt: skip


def few_heads(n: int) -> Case:
    """What is measured up to a million tokens, where dense attention takes seconds."""
    return Case(n, heads=8, kv_heads=2, topk=704, flex=False)


CASES = (
    Case(131072),
    Case(131072, topk=704),
    Case(16384),
    SEED_ROW,
    few_heads(1048576),
    few_heads(131072),
    Case(32768),
    Case(65536),
    Case(8192, flex=False),
    Case(4096),
    Case(2048, flex=False),
    Case(1024, flex=False),
    few_heads(524288),
    few_heads(262144),
    few_heads(65536),
    few_heads(16384),
    few_heads(4096),
    few_heads(1024),
    Case(65536, topk=704, flex=False),
    Case(32768, topk=704, flex=False),
    Case(16384, topk=704, flex=False),
    Case(8192, topk=704, flex=False),
    Case(4096, topk=704, flex=False),
)
