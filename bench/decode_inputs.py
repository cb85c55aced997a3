"""Caches of random keys and values in pages, and the same as contiguous tensors for peers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bench.decode_cases import POOL_KEYS, DecodeCase

MAX_CACHE_BYTES = 24 << 30  # of all caches of a case, peers' copies aside
L2_MULTIPLE = 3  # data read between two uses of a set, in units of the L2 cache


@dataclass(frozen=True)
class Cache:
    """One layer's cache: pages [N, Hkv, P, D] in random order, lengths, queries."""

    query: torch.Tensor  # [B, Hq, Lq, D]
    key: torch.Tensor
    value: torch.Tensor
    block_table: torch.Tensor  # [B, max_pages] int32
    lengths: torch.Tensor  # [B] int32
    summaries: Any = None  # condensate_ext.KVSummaries

    def paged(self) -> dict[str, torch.Tensor]:
        return {"block_table": self.block_table}


def make_cache(case: DecodeCase, seed: int, device: str = "cuda") -> Cache:
    """Neighbouring keys resemble each other, so that units differ in mass."""
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = case.torch_dtype

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    pages = case.batch * case.max_pages
    shape = (pages, case.kv_heads, case.page_size, case.head_dim)
    key, value = normal(*shape), normal(*shape)
    # A topic of 64 tokens: of a page, or of pages that stand together.
    run = max(1, POOL_KEYS // case.page_size)
    topics = normal(-(-case.max_pages // run), case.kv_heads, 1, case.head_dim)
    topics = topics.repeat_interleave(run, dim=0)[: case.max_pages]
    order = torch.randperm(pages, generator=generator, device=device)
    table = order.view(case.batch, case.max_pages)
    for sequence in table:
        key[sequence] = key[sequence].add_(topics).mul_(0.7)
    return Cache(
        normal(case.batch, case.heads, case.query_len, case.head_dim),
        key,
        value,
        table.to(torch.int32).contiguous(),
        torch.full((case.batch,), case.n, dtype=torch.int32, device=device),
    )


def contiguous(case: DecodeCase, cache: Cache, pages: torch.Tensor) -> torch.Tensor:
    """Keys or values as [B, Hkv, n, D]."""
    x = pages[cache.block_table.long()]  # [B, max_pages, Hkv, P, D]
    x = x.transpose(1, 2).reshape(case.batch, case.kv_heads, -1, case.head_dim)
    return x[:, :, : case.n].contiguous()


def num_sets(set_bytes: int, touched_bytes: int, l2_bytes: int) -> int:
    """Caches to rotate so that no call finds in L2 what it touches, as among a model's layers."""
    wanted = max(1, -(-L2_MULTIPLE * l2_bytes // max(touched_bytes, 1)))
    return max(1, min(wanted, MAX_CACHE_BYTES // set_bytes))


def page_lists(
    case: DecodeCase, seed: int, device: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor]:
    """For `given` cases: runs of 16 tokens, at random, for every KV head; as columns of 16-token
    pages [B, Hkv, K / 16] and as tokens [B, Hkv, 1, K], both ascending."""
    generator = torch.Generator(device=device).manual_seed(seed)
    runs = case.topk // 16
    noise = torch.rand(case.batch, case.kv_heads, case.n // 16, generator=generator, device=device)
    columns = noise.topk(runs, dim=-1).indices.sort(dim=-1).values
    tokens = columns[..., None] * 16 + torch.arange(16, device=device)
    return columns, tokens.flatten(-2).unsqueeze(2).to(torch.int32).contiguous()
