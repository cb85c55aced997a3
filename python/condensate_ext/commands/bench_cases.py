"""What ``condensate bench`` times: prefill and decoding steps beside torch's dense kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from condensate_ext import KVSummaries, attention, attention_with_kvcache
from condensate_ext.evaluate.policies import ANCHORS, WINDOW, policy

REPEATS = 5
_SECONDS = 4.0  # of repeats of one call; a slow one is timed once after its warm-up
SHORTLIST = 2048
# Not the MATH backend: it writes the scores down.
_BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)
Record = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """One sequence of an attention layer."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: str

    def tensors(self, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random ``[1, heads, queries, D]`` and twice ``[1, kv_heads, keys, D]``."""
        generator = torch.Generator(self.device).manual_seed(keys)
        shapes = ((self.heads, queries), (self.kv_heads, keys), (self.kv_heads, keys))
        q, k, v = (
            torch.randn(
                1, heads, length, self.head_dim,
                generator=generator, device=self.device, dtype=self.dtype,
            )
            for heads, length in shapes
        )  # fmt: skip
        return q, k, v


def milliseconds(run: Callable[[], object], device: str) -> float:
    """Median wall time of a call, after one that is not counted."""
    times: list[float] = []
    for number in range(REPEATS + 1):
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        if number:
            times.append(1e3 * (time.perf_counter() - began))
        if sum(times) > 1e3 * _SECONDS:
            break
    return statistics.median(times)


def best_dense(query: Tensor, key: Tensor, value: Tensor) -> tuple[float, str]:
    """Time of torch's fastest kernel for this call, and its name.

    Raises:
        RuntimeError: torch has none that does not write the scores down.
    """
    causal, times = query.shape[2] > 1, {}
    for backend in _BACKENDS:
        with sdpa_kernel(backend):
            try:
                times[backend.name] = milliseconds(
                    lambda: F.scaled_dot_product_attention(
                        query, key, value, is_causal=causal, enable_gqa=True
                    ),
                    str(query.device),
                )
            except RuntimeError:  # this torch or device has no such kernel; another one counts
                continue
    if not times:
        raise RuntimeError(
            f"torch has no fused attention for {query.dtype} on {query.device}; use another --dtype"
        )
    name = min(times, key=lambda candidate: times[candidate])
    return times[name], name.removesuffix("_ATTENTION").lower()


@torch.no_grad()
def prefill(shape: Shape, tokens: int, budgets: list[int]) -> list[Record]:
    """Causal attention of a whole sequence, selection included; one record a budget."""
    query, key, value = shape.tensors(tokens, tokens)
    dense, kernel = best_dense(query, key, value)
    records = []
    for budget in budgets:
        options = policy("block", budget)
        ms = milliseconds(lambda o=options: attention(query, key, value, **o), shape.device)  # type: ignore[misc]
        records.append(_record("prefill", tokens, budget, ms, dense, kernel))
    return records


@torch.no_grad()
def decode(shape: Shape, tokens: int, budgets: list[int]) -> list[Record]:
    """One new query over a contiguous cache: summaries brought up to date, then the attention."""
    query, key, value = shape.tensors(1, tokens)
    dense, kernel = best_dense(query, key, value)
    lengths = torch.tensor([tokens], dtype=torch.int32, device=shape.device)
    summaries = KVSummaries.empty_for(key, paged=False)
    summaries.update_(key, value, lengths, appended=tokens)
    records = []
    for budget in budgets:
        topk = budget - WINDOW - ANCHORS

        def step(topk: int = topk) -> object:
            summaries.update_(key, value, lengths, appended=1)
            return attention_with_kvcache(
                query, key, value, lengths, summaries=summaries, window=WINDOW, anchors=ANCHORS,
                topk=topk, shortlist=max(SHORTLIST, -(-topk // 8) * 8),
            )  # fmt: skip

        ms = milliseconds(step, shape.device)
        records.append(_record("decode", tokens, budget, ms, dense, kernel))
    return records


def _record(
    what: str, tokens: int, budget: int, ms: float, dense: float, kernel: str
) -> Record:
    return {
        "what": what,
        "tokens": tokens,
        "budget": budget,
        "ms": ms,
        "dense_ms": dense,
        "dense_kernel": kernel,
        "speedup": dense / ms,
    }


def break_even(records: list[Record], what: str, budget: int) -> str:
    """From which of the measured lengths on it is faster than dense attention."""
    line = sorted(
        (r["tokens"], r["speedup"])
        for r in records
        if r["what"] == what and r["budget"] == budget
    )
    faster = [tokens for tokens, speedup in line if speedup > 1]
    slower = [tokens for tokens, speedup in line if speedup <= 1]
    if not faster:
        return f"{what}, {budget} keys: dense attention is faster at every length measured"
    if not slower:
        return f"{what}, {budget} keys: faster at every length measured, from {faster[0]} tokens on"
    later = [tokens for tokens in faster if tokens > max(slower)]
    if not later:
        return f"{what}, {budget} keys: dense attention is faster at {max(slower)} tokens, too"
    return f"{what}, {budget} keys: break-even between {max(slower)} and {later[0]} tokens"
