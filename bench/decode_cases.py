"""What the decode suite measures: steps of a batch over a cache, and the bytes they must read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

UNIT_KEYS, POOL_KEYS = 8, 64  # of the summaries (docs/decoding.md)
SCALE_BYTES = 4

# selected: a step as a model makes it. dense: the same with a budget that covers the context.
# given: attention alone, lists from the caller. prefill: a chunk of new tokens over a cache.
Kind = Literal["selected", "dense", "given", "prefill"]


@dataclass(frozen=True)
class DecodeCase:
    """`query_len` new tokens of every sequence over `n` cached keys, theirs included."""

    batch: int
    n: int
    query_len: int = 1
    kind: Kind = "selected"
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    page_size: int = 64
    window: int = 256
    anchors: int = 64
    topk: int = 704
    shortlist: int = 4096

    @property
    def name(self) -> str:
        length = f"{self.n // 1024}K" if self.n < 1 << 20 else f"{self.n >> 20}M"
        queries = f"_q{self.query_len}" if self.query_len > 1 else ""
        keys = "" if self.kind in ("dense", "prefill") else f"_{self.budget}keys"
        pages = "" if self.page_size == 64 else f"_p{self.page_size}"
        return f"{self.kind}_b{self.batch}_{length}{queries}{keys}{pages}"

    @property
    def budget(self) -> int:
        """Keys that a query attends."""
        budget = self.window + self.anchors + self.topk
        return self.n if self.kind == "dense" else min(budget, self.n)

    @property
    def selects(self) -> bool:
        """Or are all candidates scored anyway?"""
        scored = self.window + self.anchors + self.shortlist + POOL_KEYS
        return self.kind in ("selected", "prefill") and self.n > scored

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def max_pages(self) -> int:
        return -(-self.n // self.page_size)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def rows(self) -> int:
        """KV heads of the whole batch."""
        return self.batch * self.kv_heads

    @property
    def key_bytes(self) -> int:
        """One key of one KV head, or one value."""
        return self.head_dim * self.torch_dtype.itemsize

    @property
    def kv_bytes(self) -> int:
        return 2 * self.rows * self.n * self.key_bytes

    @property
    def summary_bytes(self) -> int:
        """Of whole pages of 64 tokens or less."""
        summarised = self.n // UNIT_KEYS + self.n // min(POOL_KEYS, self.page_size)
        return self.rows * summarised * (self.head_dim + SCALE_BYTES)

    @property
    def step_bytes(self) -> int:
        """What a step reads and writes at least, lists of several queries taken as one."""
        query_and_out = 2 * self.batch * self.heads * self.query_len * self.key_bytes
        if not self.selects and self.kind != "given":
            return self.kv_bytes + query_and_out
        ranges = self.window + self.anchors
        keys = ranges + (self.topk if self.kind == "given" else self.shortlist)
        gathered = self.rows * (keys + ranges + self.topk) * self.key_bytes
        read = gathered + query_and_out
        return read if self.kind == "given" else read + self.summary_bytes


CASES = (
    DecodeCase(1, 131072),
    DecodeCase(8, 131072),
    DecodeCase(1, 131072, query_len=8),
    DecodeCase(1, 131072, query_len=8, kind="dense"),
    DecodeCase(64, 32768),
    DecodeCase(16, 32768),
    DecodeCase(1, 4096),
    DecodeCase(8, 131072, kind="given", page_size=16, window=0, anchors=0, topk=2048),
    DecodeCase(1, 1048576),
    DecodeCase(1, 131072, query_len=2048, kind="prefill"),
    DecodeCase(1, 131072, kind="dense"),
    DecodeCase(8, 131072, kind="dense"),
    DecodeCase(1, 4096, kind="dense"),
    DecodeCase(64, 32768, kind="dense"),
    DecodeCase(1, 131072, topk=1728),
    DecodeCase(1, 131072, page_size=16),
    DecodeCase(1, 32768),
    DecodeCase(8, 32768),
)
