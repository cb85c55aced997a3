"""The doctor's trial of each path: answers that are known without another implementation."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

# In the order that calls prefer them; simt and cpu_reference take everything.
PATHS = {"cpu": ("cpu", "cpu_reference"), "cuda": ("sm90", "sm80", "simt")}
_FORCE = "CONDENSATE_FORCE_PATH"
_HEADS, _KV_HEADS, _DIM, _KEYS = 4, 2, 64, 4096
_CHUNK = 256  # keys in a row that are equal: pools of them lose nothing


@dataclass(frozen=True)
class Check:
    """One trial of one path."""

    device: str
    path: str
    name: str
    status: str
    """``"ok"``, ``"failed"``, or ``"not usable"`` where the path cannot run here."""
    detail: str


@contextmanager
def forced(path: str) -> Iterator[None]:
    """Every call takes this path meanwhile."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def _tensors(device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(device, _dtype(device)) for s in shapes]


def _error(ours: Tensor, expected: Tensor, allowed: float, what: str) -> str:
    error = (ours.float() - expected.float()).abs().max().item()
    if not error < allowed:
        raise RuntimeError(f"{what} by {error:.2e}, more than {allowed:.0e}")
    return f"largest difference {error:.1e}"


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's attention in float32 of queries that are the last of the keys' positions."""
    queries, keys = query.shape[2], key.shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    tensors = (query.float(), key.float(), value.float())
    return F.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True)


def dense(device: str) -> str:
    """A call that attends everything is torch's own attention."""
    from condensate_ext import ops

    query, key, value = _tensors(device, *[(1, heads, 192, _DIM) for heads in (4, 2, 2)])
    allowed = 1e-5 if device == "cpu" else 2e-2
    ours = ops.attention(query, key, value)
    return _error(ours, _causal(query, key, value), allowed, "differs from dense attention")


def selection(device: str) -> str:
    """Keys that outweigh all others are hidden where only a selection finds them."""
    from condensate_ext import ops
    from condensate_ext._selectors import Selector

    query, key = _tensors(device, (1, _HEADS, 1, _DIM), (1, _HEADS, 2048, _DIM))
    query = query.expand(-1, -1, 128, -1)
    key, hidden = 0.1 * key, slice(640, 704)
    key[:, :, hidden] += query[:, :, :1]
    value = torch.zeros_like(key)
    value[:, :, hidden] = 1
    for selector in get_args(Selector):
        out, _, omitted = ops.attention_forward(
            query.contiguous(), key, value, topk=64, selector=selector
        )
        found = out.float().min().item()
        if not (found > 0.6 and omitted.max().item() < 0.4):
            raise RuntimeError(f'selector "{selector}" missed keys of nearly all the mass: {found}')
    return f"found by {', '.join(get_args(Selector))}"


def _pooled(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Queries over keys and values of which whole chunks are equal."""
    chunks = (1, _KV_HEADS, _KEYS // _CHUNK, _DIM)
    query, key, value = _tensors(device, (1, _HEADS, 128, _DIM), chunks, chunks)
    return query, key.repeat_interleave(_CHUNK, 2), value.repeat_interleave(_CHUNK, 2)


def far_field(device: str) -> str:
    """Where pools hold equal keys and equal values, condensing them is dense attention."""
    from condensate_ext import ops

    query, key, value = _pooled(device)
    ours = ops.attention(query, key, value, topk=64)
    expected = _causal(query, key, value)
    without = ops.attention(query, key, value, topk=64, far_field=False)
    if (without.float() - expected).abs().max() < 0.1:
        raise RuntimeError("the check proves nothing: dense without the far field")
    allowed = 1e-4 if device == "cpu" else 3e-2
    return _error(ours, expected, allowed, "differs from dense attention over equal keys")


def decode(device: str) -> str:
    """The same of one query over a cache, whose summaries have 8 bits."""
    from condensate_ext import KVSummaries, attention_with_kvcache

    query, key, value = _pooled(device)
    lengths = torch.tensor([_KEYS], dtype=torch.int32, device=device)
    summaries = KVSummaries.empty_for(key, paged=False)
    summaries.update_(key, value, lengths, appended=_KEYS)
    query = query[:, :, -1:].contiguous()
    ours = attention_with_kvcache(
        query, key, value, lengths, summaries=summaries, topk=512, shortlist=512
    )
    assert isinstance(ours, Tensor)
    expected = _causal(query, key, value)
    return _error(ours, expected, 5e-2, "differs from dense attention over equal keys")


CHECKS: dict[str, Callable[[str], str]] = {
    "dense": dense,
    "selection": selection,
    "far field": far_field,
    "decode over a cache": decode,
}


def devices() -> list[str]:
    """Those that this build has kernels for."""
    found = ["cpu"]
    if torch.cuda.is_available() and importlib.import_module("condensate_ext._C").build_info()[
        "cuda"
    ]:
        found += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return found


def run() -> Iterator[Check]:
    """Every check on every path of every device."""
    for device in devices():
        for path in PATHS[device.split(":")[0]]:
            for name, check in CHECKS.items():
                yield _tried(device, path, name, check)


def _tried(device: str, path: str, name: str, check: Callable[[str], str]) -> Check:
    try:
        with forced(path), torch.no_grad():
            return Check(device, path, name, "ok", check(device))
    except Exception as error:  # whatever it is, the report must say it
        if "cannot run this call" in str(error):
            return Check(device, path, name, "not usable", str(error))
        return Check(device, path, name, "failed", f"{error}")
