"""Random inputs with the structure that selection lives on, and facts about lists."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.cases import BLOCK_KEYS, Case

MAX_INPUT_SETS = 4


@dataclass(frozen=True)
class Inputs:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def make_inputs(case: Case, seed: int, device: str = "cuda") -> Inputs:
    """Neighbouring keys resemble each other, so that blocks differ in mass; never zeros."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(heads: int, length: int) -> torch.Tensor:
        return torch.randn(
            1, heads, length, case.head_dim,
            generator=generator, device=device, dtype=case.torch_dtype,
        )  # fmt: skip

    topic = normal(case.kv_heads, -(-case.n // BLOCK_KEYS))
    topic = topic.repeat_interleave(BLOCK_KEYS, dim=2)[:, :, : case.n]
    key = normal(case.kv_heads, case.n).add_(topic).mul_(0.7)
    return Inputs(normal(case.heads, case.n), key, normal(case.kv_heads, case.n))


def make_input_sets(case: Case, l2_bytes: int) -> list[Inputs]:
    """Enough sets that a round never finds its inputs in the L2 cache from the last one."""
    set_bytes = 2 * case.query_bytes + case.kv_bytes
    count = min(MAX_INPUT_SETS, max(1, -(-4 * l2_bytes // set_bytes)))
    return [make_inputs(case, seed) for seed in range(count)]


def given_lists(case: Case, seed: int, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    """Random lists: distinct blocks before every row's window and after the anchors."""
    generator = torch.Generator(device=device).manual_seed(seed)
    tiles = case.n // case.tile_positions
    first = torch.arange(tiles, device=device) * case.tile_positions
    low = -(-case.anchors // BLOCK_KEYS)
    high = ((first - case.window + 1).clamp(min=0) // BLOCK_KEYS).clamp(min=low)  # exclusive
    num_blocks = case.n // BLOCK_KEYS
    noise = torch.rand(case.kv_heads, tiles, num_blocks, generator=generator, device=device)
    block = torch.arange(num_blocks, device=device)
    noise.masked_fill_((block < low) | (block >= high[:, None]), -1.0)
    picked = noise.topk(min(case.max_blocks, num_blocks), dim=-1)
    indices = picked.indices.masked_fill(picked.values < 0, num_blocks).sort(dim=-1).values
    counts = (indices < num_blocks).sum(dim=-1, dtype=torch.int32)
    indices = indices.masked_fill(indices == num_blocks, -1).to(torch.int32)
    return indices[None].contiguous(), counts[None].contiguous()


def mean_keys_per_query(case: Case, indices: torch.Tensor, counts: torch.Tensor) -> float:
    """Exact mean size of the support over rows and KV heads, each key counted once."""
    positions = case.tile_positions
    tiles = indices.shape[2]
    total = 0
    for offset in range(positions):
        p = torch.arange(tiles, device=indices.device) * positions + offset
        window_begin = (p - case.window + 1).clamp(min=0)
        anchors = torch.minimum(torch.full_like(p, case.anchors), window_begin)
        total += int((p + 1 - window_begin + anchors).sum()) * case.kv_heads
        slot = torch.arange(indices.shape[3], device=indices.device)
        begin = (indices * BLOCK_KEYS).clamp(min=case.anchors)
        end = torch.minimum(indices * BLOCK_KEYS + BLOCK_KEYS, window_begin[:, None])
        outside = (end - begin).clamp(min=0) * (slot < counts[..., None])
        total += int(outside.sum())
    return total / (tiles * positions * case.kv_heads)
