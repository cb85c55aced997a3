"""Shapes of every operator without running it, for torch.compile, torch.export and meta tensors.

The index arithmetic mirrors csrc/include/condensate/geometry.h; tests hold the two together. Sizes
may be symbolic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from condensate_ext._selectors import SELECTORS

BLOCK_KEYS = 64
TILE_ROWS = 128
MAX_TILE_POSITIONS = 64
ROWS_PER_BLOCK = {"block": 8 + 1, "quest": 4, "mean": 1}  # of the summaries
_NAMES = {number: name for name, number in SELECTORS.items()}


def tile_positions(group: int) -> int:
    """Query positions of one tile: the largest power of two with positions * group <= 128."""
    positions = MAX_TILE_POSITIONS
    while positions > 1 and positions * group > TILE_ROWS:
        positions //= 2
    return positions


def _ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def num_tiles(query_len: int, query_heads: int, kv_heads: int) -> int:
    """Tiles, hence lists, per batch entry and KV head."""
    return _ceil_div(query_len, tile_positions(query_heads // kv_heads))


def summary_shape(kv_len: int, head_dim: int, selector: str) -> tuple[int, int]:
    """Rows of one KV head's summaries and elements of a row."""
    if selector not in ROWS_PER_BLOCK:
        raise ValueError(
            f'selector is "{selector}", expected "block", "quest" or "mean"; "exact" has no '
            "summaries, use select_tokens."
        )
    rows = _ceil_div(kv_len, BLOCK_KEYS) * ROWS_PER_BLOCK[selector]
    return rows, 2 * head_dim if selector == "quest" else head_dim


def _out(query: Tensor) -> Tensor:
    # new_empty of the sizes, not empty_like: the result is contiguous whatever query's strides.
    return query.new_empty(query.shape)


def _rows(query: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=dtype)


def _attention(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
    return _out(query)


def _attention_forward(
    query: Tensor, key: Tensor, value: Tensor, **_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _out(query), _rows(query), _rows(query)


def _block_summaries(key: Tensor, *, selector: int = 0) -> Tensor:
    batch, heads, kv_len, head_dim = key.shape
    return key.new_empty((batch, heads, *summary_shape(kv_len, head_dim, _NAMES[selector])))


def _select_blocks(
    query: Tensor,
    summaries: Tensor,
    key: Tensor | None = None,
    *,
    kv_len: int,
    topk: int = 1728,
    **_: object,
) -> tuple[Tensor, Tensor]:
    batch, query_heads, query_len, _head_dim = query.shape
    kv_heads = summaries.shape[1]
    tiles = num_tiles(query_len, query_heads, kv_heads)
    return (
        query.new_empty((batch, kv_heads, tiles, topk // BLOCK_KEYS), dtype=torch.int32),
        query.new_empty((batch, kv_heads, tiles), dtype=torch.int32),
    )


def _select_tokens(query: Tensor, key: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    return _rows(query), _rows(query, torch.int32)


def _block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    **_: object,
) -> tuple[Tensor, Tensor]:
    return _out(query), _rows(query)


def _omitted_mass(
    query: Tensor, key: Tensor, lse: Tensor, *, rows: Tensor | None = None, **_: object
) -> Tensor:
    batch, heads, query_len, _head_dim = query.shape
    count = query_len if rows is None else rows.shape[0]
    return query.new_empty((batch, heads, count), dtype=torch.float32)


def _merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    return _out(out_a), _rows(out_a)


def _attention_with_kvcache(query: Tensor, *_: object, **__: object) -> tuple[Tensor, ...]:
    return _out(query), _rows(query), _rows(query)


def _attention_with_kvcache_(query: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return _rows(query), _rows(query)


def _select_tokens_with_kvcache(
    query: Tensor, key_cache: Tensor, *_: object, topk: int = 704, **__: object
) -> tuple[Tensor, Tensor]:
    batch, _heads, query_len, _head_dim = query.shape
    lists = (batch, key_cache.shape[1], query_len)
    return (
        query.new_empty((*lists, topk), dtype=torch.int32),
        query.new_empty(lists, dtype=torch.int32),
    )


def _token_sparse_attention_with_kvcache(
    query: Tensor, *_: object, **__: object
) -> tuple[Tensor, Tensor]:
    return _out(query), _rows(query)


def _update_kv_summaries_(*_: object, **__: object) -> None:
    return None


FAKES: dict[str, Callable[..., Any]] = {
    "attention": _attention,
    "attention_forward": _attention_forward,
    "block_summaries": _block_summaries,
    "select_blocks": _select_blocks,
    "select_tokens": _select_tokens,
    "block_sparse_attention": _block_sparse_attention,
    "omitted_mass": _omitted_mass,
    "merge_states": _merge_states,
    "attention_with_kvcache": _attention_with_kvcache,
    "attention_with_kvcache_": _attention_with_kvcache_,
    "select_tokens_with_kvcache": _select_tokens_with_kvcache,
    "token_sparse_attention_with_kvcache": _token_sparse_attention_with_kvcache,
    "update_kv_summaries_": _update_kv_summaries_,
}


def register() -> None:
    """Gives every operator its fake kernel; called once, when the package is imported."""
    for name, fake in FAKES.items():
        torch.library.register_fake(f"condensate::{name}", fake)
