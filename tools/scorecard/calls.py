"""The operators, one entry each: how a sound call of it looks. Lines go over this table."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import condensate_ext
import torch
from condensate_ext import _token_selection
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SELECTORS = ("block", "quest", "mean", "exact")

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What decides the shapes of a call."""

    dtype: torch.dtype = torch.float32
    batch: int = 1
    kv_heads: int = 2
    group: int = 2
    query_len: int = 40
    kv_len: int = 300
    head_dim: int = 32
    causal: bool = True
    selector: str = "block"
    topk: int = 64


@dataclass(frozen=True)
class Op:
    """An operator: `make` gives all arguments of a sound call by name."""

    name: str
    make: Callable[[Sizes, str, torch.Generator], Arguments]
    selectors: tuple[str, ...] = ()  # that its argument `selector` takes

    def __call__(self, arguments: Arguments) -> tuple[Tensor, ...]:
        module = _token_selection if self.name == "select_tokens" else condensate_ext
        result = getattr(module, self.name)(**arguments)
        return result if isinstance(result, tuple) else (result,)


def random_sizes(rng: random.Random, longest: int = 700) -> Sizes:
    """Edges of tiles and blocks more often than the middle."""
    edges = [1, 63, 64, 65, 127, 128, 129, 191, 256]

    def length(most: int) -> int:
        return rng.choice([edge for edge in edges if edge <= most] + [rng.randint(1, most)])

    return Sizes(
        dtype=rng.choice(DTYPES),
        batch=rng.choice([1, 1, 2, 3]),
        kv_heads=rng.choice([1, 1, 2, 3]),
        group=rng.choice([1, 2, 3, 4, 8, 16]),
        query_len=length(140),
        kv_len=length(longest),
        head_dim=rng.choice([8, 16, 40, 64, 64, 96, 128, 128, 256]),
        causal=rng.random() < 0.7,
        selector=rng.choice(SELECTORS),
        topk=64 * rng.choice([0, 1, 1, 2, 3]),
    )


def qkv(sizes: Sizes, device: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    def make(heads: int, length: int) -> Tensor:
        shape = (sizes.batch, heads, length, sizes.head_dim)
        return torch.randn(shape, generator=generator).to(device, sizes.dtype)

    query = make(sizes.kv_heads * sizes.group, sizes.query_len)
    return query, make(sizes.kv_heads, sizes.kv_len), make(sizes.kv_heads, sizes.kv_len)


def _ranges(sizes: Sizes) -> Arguments:
    return {"window": 24, "anchors": 5, "causal": sizes.causal}


def _block_selector(sizes: Sizes) -> str:
    return sizes.selector if sizes.selector != "exact" else "block"


def _policy(sizes: Sizes, device: str, generator: torch.Generator) -> Arguments:
    query, key, value = qkv(sizes, device, generator)
    options = {**_ranges(sizes), "topk": sizes.topk, "selector": sizes.selector}
    return {"query": query, "key": key, "value": value, **options}


def _summaries(sizes: Sizes, device: str, generator: torch.Generator) -> Arguments:
    return {"key": qkv(sizes, device, generator)[1], "selector": _block_selector(sizes)}


def _select_blocks(sizes: Sizes, device: str, generator: torch.Generator) -> Arguments:
    query, key, _ = qkv(sizes, device, generator)
    selector = _block_selector(sizes)
    units = condensate_ext.block_summaries(key, selector=selector)  # type: ignore[arg-type]
    options = {**_ranges(sizes), "kv_len": sizes.kv_len, "topk": sizes.topk, "selector": selector}
    return {"query": query, "summaries": units, "key": key, **options}


def _select_tokens(sizes: Sizes, device: str, generator: torch.Generator) -> Arguments:
    query, key, _ = qkv(sizes, device, generator)
    return {"query": query, "key": key, **_ranges(sizes), "topk": sizes.topk}


def _lists(sizes: Sizes, device: str, generator: torch.Generator) -> Arguments:
    query, key, value = qkv(sizes, device, generator)
    chosen = replace(sizes, topk=max(sizes.topk, 64))
    selection = _select_blocks(chosen, device, generator)
    indices, counts = condensate_ext.select_blocks(**selection)
    return {
        "query": query, "key": key, "value": value, "block_indices": indices,
        "block_counts": counts, **_ranges(sizes), "far_field": sizes.selector == "block",
    }  # fmt: skip


def _omitted_mass(sizes: Sizes, device: str, generator: torch.Generator) -> Arguments:
    query, key, _ = qkv(sizes, device, generator)
    lse = torch.randn(query.shape[:3], generator=generator).to(device)
    rows = torch.randint(0, sizes.query_len, (3,), generator=generator).to(device)
    return {"query": query, "key": key, "lse": lse, "rows": rows, "causal": sizes.causal}


def _merge_states(sizes: Sizes, device: str, generator: torch.Generator) -> Arguments:
    first, second = (qkv(sizes, device, generator)[0] for _ in range(2))
    lse = [torch.randn(first.shape[:3], generator=generator).to(device) for _ in range(2)]
    return {"out_a": first, "lse_a": lse[0], "out_b": second, "lse_b": lse[1]}


OPS = (
    Op("attention", _policy, SELECTORS),
    Op("attention_forward", _policy, SELECTORS),
    Op("block_summaries", _summaries, SELECTORS[:3]),
    Op("select_blocks", _select_blocks, SELECTORS[:3]),
    Op("select_tokens", _select_tokens),
    Op("block_sparse_attention", _lists),
    Op("omitted_mass", _omitted_mass),
    Op("merge_states", _merge_states),
)


def tensors_of(arguments: Arguments) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """Bitwise equal, NaN as NaN."""
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) and torch.equal(x.isnan(), y.isnan())
               for x, y in zip(a, b, strict=True))  # fmt: skip
