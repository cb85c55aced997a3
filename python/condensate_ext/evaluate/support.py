"""What a policy's call attends: its lists of blocks and, with far field, the log-sum-exp of the
whole blocks without its pools."""

from __future__ import annotations

import torch
from torch import Tensor

from condensate_ext._checks import BLOCK_KEYS
from condensate_ext._fake import num_tiles, tile_positions
from condensate_ext.evaluate.policies import Policy, condenses, effective
from condensate_ext.ops import block_sparse_attention, block_summaries, select_blocks

# The policy's arguments of the selection; those of the attention shape its ranges as well.
_SELECTION = ("window", "anchors", "topk", "topk_per_head", "top_p", "selector")


def lists(
    query: Tensor, key: Tensor, policy: Policy, *, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The lists that ``attention`` makes in a causal call of the policy, as ``select_blocks``
    returns them; the policy's selector lists blocks."""
    chosen = {name: effective(policy, name) for name in _SELECTION}
    summaries = block_summaries(key, selector=chosen["selector"])
    return select_blocks(
        query, summaries, key, kv_len=key.shape[2], far_field=condenses(policy), scale=scale,
        **chosen,
    )  # fmt: skip


def attended_lse(
    query: Tensor, key: Tensor, value: Tensor, policy: Policy, *, scale: float | None
) -> Tensor:
    """``[B, Hq, Lq]``: log-sum-exp of the keys that ``attention`` attends in causal calls with far
    field which select blocks.

    Each tile attends its listed blocks and all blocks with anchors or window keys of its rows, so
    lists of all these blocks alone give the same support.
    """
    indices, _ = lists(query, key, policy, scale=scale)
    beside = _range_blocks(query, key, effective(policy, "window"), effective(policy, "anchors"))
    _, lse = block_sparse_attention(
        query,
        key,
        value,
        *_joined(indices, beside),
        window=0,
        anchors=0,
        far_field=False,
        scale=scale,
    )
    return lse


def _range_blocks(query: Tensor, key: Tensor, window: int, anchors: int) -> Tensor:
    """``[T, X]`` int32: blocks with anchors or window keys of a tile's rows, -1 in free places."""
    (heads, query_len), (kv_heads, kv_len) = query.shape[1:3], key.shape[1:3]
    positions = tile_positions(heads // kv_heads)
    begin = positions * torch.arange(num_tiles(query_len, heads, kv_heads), device=query.device)
    first = begin[:, None] + kv_len - query_len  # of the tile's positions
    last = (begin[:, None] + positions).clamp(max=query_len) - 1 + kv_len - query_len

    anchored = torch.arange(0, min(anchors, kv_len), BLOCK_KEYS, device=query.device)
    anchored = (anchored // BLOCK_KEYS).expand(len(begin), -1)
    anchored = anchored.masked_fill(anchored * BLOCK_KEYS > last, -1)
    if window == 0:
        return anchored.int()
    oldest = (first - window + 1).clamp(min=0) // BLOCK_KEYS
    width = (min(window, kv_len) + positions) // BLOCK_KEYS + 2  # as many as windows can reach
    near = oldest + torch.arange(width, device=query.device)
    beyond = (near * BLOCK_KEYS > last) | (near * BLOCK_KEYS < anchors)
    return torch.cat([anchored, near.masked_fill(beyond, -1)], 1).int()


def _joined(indices: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending lists ``[B, Hkv, T, K + X]`` of both, each block once, and their counts."""
    blocks = torch.cat([indices, beside.expand(*indices.shape[:3], -1)], -1)
    free = torch.iinfo(torch.int32).max
    blocks = blocks.masked_fill(blocks < 0, free).sort(-1).values
    # Where tiles share a scan, their lists may hold blocks of their own windows.
    repeated = torch.zeros_like(blocks, dtype=torch.bool)
    repeated[..., 1:] = blocks[..., 1:] == blocks[..., :-1]
    blocks = blocks.masked_fill(repeated, free).sort(-1).values
    counts = (blocks < free).sum(-1, dtype=torch.int32)
    return blocks.masked_fill(blocks == free, -1).contiguous(), counts
