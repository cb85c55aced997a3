"""What condensate is compared with, on the same inputs in the same run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from bench.cases import BLOCK_KEYS, Case
from bench.inputs import Inputs

DENSE_BACKENDS = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
}


def dense(inputs: Inputs, backend: SDPBackend) -> torch.Tensor:
    """Causal attention over everything by one of torch's own kernels."""
    grouped = inputs.query.shape[1] != inputs.key.shape[1]
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(
            inputs.query, inputs.key, inputs.value, is_causal=True, enable_gqa=grouped
        )


def pack_tiles(case: Case, x: torch.Tensor) -> torch.Tensor:
    """[B, Hq, n, D] -> [B, Hkv, n*G, D], the rows of a tile side by side, head by head."""
    positions = case.tile_positions
    batch, _, length, dim = x.shape
    x = x.view(batch, case.kv_heads, case.group, length // positions, positions, dim)
    return x.transpose(2, 3).reshape(batch, case.kv_heads, length * case.group, dim)


def unpack_tiles(case: Case, x: torch.Tensor) -> torch.Tensor:
    """The inverse of pack_tiles."""
    positions = case.tile_positions
    batch, _, rows, dim = x.shape
    tiles = rows // (case.group * positions)
    x = x.view(batch, case.kv_heads, tiles, case.group, positions, dim).transpose(2, 3)
    return x.reshape(batch, case.heads, tiles * positions, dim)


def compact(blocks: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept entries first and ascending, then zeros; and how many there are."""
    last = torch.iinfo(torch.int32).max
    ordered = blocks.masked_fill(~keep, last).sort(dim=-1).values
    counts = keep.sum(dim=-1, dtype=torch.int32)
    return ordered.masked_fill(ordered == last, 0).to(torch.int32).contiguous(), counts


def range_blocks(
    case: Case, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks of anchors and window per tile [T, M], which of them exist, and which need no mask."""
    first = (torch.arange(case.n // case.tile_positions, device=device) * case.tile_positions)[
        :, None
    ]
    last = first + case.tile_positions - 1
    anchor = torch.arange(-(-case.anchors // BLOCK_KEYS), device=device).expand(len(first), -1)
    window_begin = (first - case.window + 1).clamp(min=0) // BLOCK_KEYS
    reach = (case.tile_positions + case.window) // BLOCK_KEYS + 2
    window = window_begin + torch.arange(reach, device=device)
    blocks = torch.cat([anchor, window], dim=1)
    exists = torch.cat([anchor < window_begin, window <= last // BLOCK_KEYS], dim=1)
    exists &= blocks * BLOCK_KEYS <= last
    begin, end = blocks * BLOCK_KEYS, blocks * BLOCK_KEYS + BLOCK_KEYS - 1
    full = (end <= first) & ((end < case.anchors) | (begin > last - case.window))
    return blocks, exists, full


def flex_mask(case: Case, indices: torch.Tensor, counts: torch.Tensor) -> BlockMask:
    """A FlexAttention mask over packed tiles that attends exactly the support of these lists.

    Flex keeps one list per (head, block of query rows). With the query rows packed as condensate
    packs its tiles, and KV heads as its heads, that is one list per tile: the very same lists,
    the same 64-key blocks, the same number of keys per query. Listed blocks lie before every
    row's window here, so they are `full` blocks; only window and anchor edges pay for a mask.
    """
    ranges, exists, full = range_blocks(case, indices.device)
    slot = torch.arange(indices.shape[-1], device=indices.device)
    listed = slot < counts[..., None]  # [B, Hkv, T, K]
    tile_first = torch.arange(indices.shape[2], device=indices.device) * case.tile_positions
    late = listed & (indices * BLOCK_KEYS + BLOCK_KEYS - 1 > tile_first[:, None])
    if bool(late.any()):
        raise ValueError(
            "a listed block is not visible to all rows of its tile: enlarge the window"
        )
    in_list = torch.stack(
        [((ranges[:, m, None] == indices) & listed).any(-1) for m in range(ranges.shape[1])], dim=-1
    )
    extra = exists & ~in_list  # [B, Hkv, T, M]
    everything = torch.cat([indices, ranges.expand(extra.shape).to(torch.int32)], dim=-1)
    full_blocks, full_counts = compact(everything, torch.cat([listed, extra & full], dim=-1))
    # Flex reads both kinds of lists with one stride, so both have the same width.
    partial = torch.cat([torch.zeros_like(listed), extra & ~full], dim=-1)
    blocks, block_counts = compact(everything, partial)

    positions, rows = case.tile_positions, case.tile_positions * case.group
    window, anchors = case.window, case.anchors

    def mask(
        b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        p = row // rows * positions + row % positions
        return (key <= p) & ((key < anchors) | (key > p - window))

    return BlockMask(
        (case.n * case.group, case.n),
        block_counts, blocks, full_counts, full_blocks,
        None, None, None, None,  # the backward pass's lists
        BLOCK_SIZE=(rows, BLOCK_KEYS),
        mask_mod=mask,
    )  # fmt: skip


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = 64  # one compilation per case
    return torch.compile(flex_attention, dynamic=False)


def flex(case: Case, packed_query: torch.Tensor, inputs: Inputs, mask: BlockMask) -> torch.Tensor:
    """FlexAttention over packed queries; the result is packed too."""
    rows = case.tile_positions * case.group
    # Flex's own choice of tile needs 128 rows per list; fewer must be said.
    options = None if rows >= 128 else {"BLOCK_M": rows, "BLOCK_N": BLOCK_KEYS}
    out = compiled_flex()(
        packed_query, inputs.key, inputs.value, block_mask=mask, kernel_options=options
    )
    assert isinstance(out, torch.Tensor)
    return out
