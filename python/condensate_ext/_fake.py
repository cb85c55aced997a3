"""Checks and shapes of every operator without running it, for torch.compile, torch.export and meta
tensors.

The index arithmetic mirrors csrc/include/condensate/geometry.h; tests hold the two together. Sizes
may be symbolic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from condensate_ext import _checks as checks
from condensate_ext._checks import BLOCK_KEYS, Argument
from condensate_ext._defaults import ANCHORS, CACHE_TOPK, TOPK, WINDOW
from condensate_ext._selectors import ROWS_PER_BLOCK, SELECTORS

TILE_ROWS = 128
MAX_TILE_POSITIONS = 64


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


def summary_shape(kv_len: int, head_dim: int, selector: int) -> tuple[int, int]:
    """Rows of one KV head's summaries and elements of a row."""
    rows = _ceil_div(kv_len, BLOCK_KEYS) * ROWS_PER_BLOCK[selector]
    return rows, 2 * head_dim if selector == SELECTORS["quest"] else head_dim


def _out(query: Tensor) -> Tensor:
    # new_empty of the sizes, not empty_like: the result is contiguous whatever query's strides.
    return query.new_empty(query.shape)


def _rows(query: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=dtype)


def _check_qkv(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    q, k, v = Argument(op, "query", query), Argument(op, "key", key), Argument(op, "value", value)
    for argument in (q, k, v):
        checks.view4(argument)
    checks.query_and_key(q, k)
    checks.value(v, k)


def _check_policy(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int = WINDOW,
    anchors: int = ANCHORS,
    topk: int = TOPK,
    topk_per_head: Tensor | None = None,
    top_p: float | None = None,
    far_field: bool | None = None,
    selector: int = 0,
    causal: bool = True,
    scale: float | None = None,
) -> None:
    checks.selector(op, selector)
    checks.far_field(op, far_field, selector)
    checks.budget(op, topk, topk_per_head, top_p, selector)
    _check_qkv(op, query, key, value)
    checks.ranking_scale(op, scale, selector)
    checks.problem("attention", query, key.shape[2], window=window, anchors=anchors, scale=scale)
    checks.per_head(topk_per_head, Argument(op, "query", query), key.shape[1])


def _attention(query: Tensor, key: Tensor, value: Tensor, **policy: Any) -> Tensor:
    _check_policy("attention", query, key, value, **policy)
    return _out(query)


def _attention_forward(
    query: Tensor, key: Tensor, value: Tensor, *, estimate: bool = True, **policy: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _check_policy("attention_forward", query, key, value, **policy)
    made = _rows(query) if estimate else query.new_empty((0,), dtype=torch.float32)
    return _out(query), _rows(query), made


def _block_summaries(key: Tensor, *, selector: int = 0) -> Tensor:
    op = "block_summaries"
    checks.selector(op, selector)
    argument = Argument(op, "key", key)
    checks.view4(argument)
    checks.element_type(argument)
    batch, heads, kv_len, head_dim = key.shape
    for name, size in (("batch", batch), ("kv_heads", heads), ("kv_len", kv_len)):
        checks.length(op, name, size)
    checks.head_dim(op, head_dim)
    checks.block_selector(op, selector)
    return key.new_empty((batch, heads, *summary_shape(kv_len, head_dim, selector)))


def _check_summaries(summaries: Argument, query: Argument, kv_len: int, selector: int) -> None:
    checks.same_type_and_device(summaries, query)
    batch, _heads, _len, head_dim = query.tensor.shape
    rows, dim = summary_shape(kv_len, head_dim, selector)
    made, _heads, *shape = summaries.tensor.shape
    if not checks.equal_sizes((made, *shape), (batch, rows, dim)):
        summaries.fail(
            f"has shape {summaries.shape}, expected [{batch}, kv_heads, {rows}, {dim}] for kv_len "
            f"{kv_len}; make it with block_summaries and the same selector."
        )
    if not checks.is_contiguous(summaries.tensor):
        summaries.fail(
            "is not contiguous, expected block_summaries' own result; call "
            "summaries.contiguous() first."
        )


def _check_summarised(key: Argument, query: Argument, kv_heads: int, kv_len: int) -> None:
    checks.view4(key)
    checks.same_type_and_device(key, query)
    batch, _heads, _len, head_dim = query.tensor.shape
    if not checks.equal_sizes(key.tensor.shape, (batch, kv_heads, kv_len, head_dim)):
        key.fail(
            f"has shape {key.shape}, expected [batch, kv_heads, kv_len, head_dim] as query, "
            "summaries and kv_len have them; pass the keys that were summarised."
        )


def _select_blocks(
    query: Tensor,
    summaries: Tensor,
    key: Tensor | None = None,
    *,
    kv_len: int,
    window: int = WINDOW,
    anchors: int = ANCHORS,
    topk: int = TOPK,
    topk_per_head: Tensor | None = None,
    top_p: float | None = None,
    far_field: bool = True,
    selector: int = 0,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    op = "select_blocks"
    q, s = Argument(op, "query", query), Argument(op, "summaries", summaries)
    checks.selector(op, selector)
    checks.block_selector(op, selector)
    checks.budget(op, topk, topk_per_head, top_p, selector)
    checks.view4(q)
    checks.view4(s)
    checks.element_type(q)
    batch, query_heads, query_len, _head_dim = query.shape
    kv_heads = summaries.shape[1]
    checks.heads(op, query_heads, "summaries", kv_heads)
    _check_summaries(s, q, kv_len, selector)
    if key is not None:
        _check_summarised(Argument(op, "key", key), q, kv_heads, kv_len)
    checks.per_head(topk_per_head, q, kv_heads)
    checks.problem(op, query, kv_len, window=window, anchors=anchors, scale=scale)
    checks.ranking_scale(op, scale, selector)
    tiles = num_tiles(query_len, query_heads, kv_heads)
    return (
        query.new_empty((batch, kv_heads, tiles, topk // BLOCK_KEYS), dtype=torch.int32),
        query.new_empty((batch, kv_heads, tiles), dtype=torch.int32),
    )


def _check_query_key(op: str, query: Tensor, key: Tensor) -> Argument:
    q, k = Argument(op, "query", query), Argument(op, "key", key)
    checks.view4(q)
    checks.view4(k)
    checks.query_and_key(q, k)
    return q


def _select_tokens(
    query: Tensor,
    key: Tensor,
    *,
    window: int = WINDOW,
    anchors: int = ANCHORS,
    topk: int = TOPK,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    op = "select_tokens"
    _check_query_key(op, query, key)
    checks.problem(op, query, key.shape[2], window=window, anchors=anchors, scale=scale)
    checks.topk(op, topk, SELECTORS["exact"])
    return _rows(query), _rows(query, torch.int32)


def _block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    *,
    window: int = WINDOW,
    anchors: int = ANCHORS,
    far_field: bool = True,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    op = "block_sparse_attention"
    _check_qkv(op, query, key, value)
    batch, query_heads, query_len, _head_dim = query.shape
    lists = (batch, key.shape[1], num_tiles(query_len, query_heads, key.shape[1]))
    q, indices = Argument(op, "query", query), Argument(op, "block_indices", block_indices)
    if block_indices.dim() != 4:
        indices.fail(
            f"has shape {indices.shape}, expected [batch, kv_heads, tiles, blocks] as "
            "select_blocks returns it; pass its results."
        )
    checks.contiguous(indices, torch.int32, q, (*lists, block_indices.shape[3]))
    checks.contiguous(Argument(op, "block_counts", block_counts), torch.int32, q, lists)
    checks.problem("attention", query, key.shape[2], window=window, anchors=anchors, scale=scale)
    return _out(query), _rows(query)


def _omitted_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    rows: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    op = "omitted_mass"
    q = _check_query_key(op, query, key)
    checks.contiguous(Argument(op, "lse", lse), torch.float32, q, query.shape[:3])
    batch, heads, count, _head_dim = query.shape
    if rows is not None:
        count = rows.numel()
        checks.contiguous(Argument(op, "rows", rows), torch.int64, q, [count])
    checks.problem(op, query, key.shape[2], scale=scale)
    return query.new_empty((batch, heads, count), dtype=torch.float32)


def _merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    op = "merge_states"
    first, second = Argument(op, "out_a", out_a), Argument(op, "out_b", out_b)
    checks.view4(first)
    checks.element_type(first)
    checks.contiguous(first, out_a.dtype, first, out_a.shape)
    checks.same_type_and_device(second, first)
    checks.contiguous(second, out_a.dtype, first, out_a.shape)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        checks.contiguous(Argument(op, name, lse), torch.float32, first, out_a.shape[:3])
    checks.head_dim(op, out_a.shape[3])
    return _out(out_a), _rows(out_a)


def _attention_with_kvcache(query: Tensor, *_: object, **__: object) -> tuple[Tensor, ...]:
    return _out(query), _rows(query), _rows(query)


def _attention_with_kvcache_(query: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return _rows(query), _rows(query)


def _select_tokens_with_kvcache(
    query: Tensor, key_cache: Tensor, *_: object, topk: int = CACHE_TOPK, **__: object
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
