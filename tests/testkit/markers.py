"""Marker probe: with V one-hot at chosen keys, an output shows how much its key counted.

A tolerance can hide one dropped key among thousands; this cannot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Attend = Callable[[Tensor], Tensor]  # value [B, Hkv, Lk, D] -> out [B, Hq, Lq, D]

# Large enough that a small probability does not round to 0 in float16, finite in all dtypes.
MARK = 2.0**14


def attended(attend: Attend, like: Tensor, keys: Tensor) -> Tensor:
    """bool [B, Hq, Lq, len(keys)]: which rows attend which of `keys`, at most head_dim per call.

    `like` is a value tensor; `attend` runs the op under test on values of its shape and dtype.
    """
    return weights(attend, like, keys) != 0


def weights(attend: Attend, like: Tensor, keys: Tensor) -> Tensor:
    """[B, Hq, Lq, len(keys)] float64: the softmax weight of each of `keys` in each row."""
    found = []
    for chunk in keys.split(like.shape[-1]):
        value = torch.zeros_like(like, memory_format=torch.contiguous_format)
        value[:, :, chunk, torch.arange(len(chunk), device=like.device)] = MARK
        found.append(attend(value)[..., : len(chunk)].double() / MARK)
    return torch.cat(found, dim=-1)


def extract_support(attend: Attend, like: Tensor) -> Tensor:
    """bool [B, Hq, Lq, Lk]: the whole support, whatever the queries and keys are."""
    return attended(attend, like, torch.arange(like.shape[2], device=like.device))


def edge_keys(query_len: int, kv_len: int, window: int, anchors: int, positions: int) -> list[int]:
    """Keys at and beside every edge: blocks, tiles, anchors, each tile's window, the ends."""
    offset = kv_len - query_len
    edges = {0, anchors, kv_len, offset}
    edges.update(range(0, kv_len + 1, 64))
    for start in range(0, query_len + positions, positions):
        for p in (start + offset, min(start, query_len) - 1 + offset):
            edges.update((p, p - window, p + window))
    near = {edge + d for edge in edges for d in (-2, -1, 0, 1)}
    return sorted(k for k in near if 0 <= k < kv_len)
