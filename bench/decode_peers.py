"""What decoding is compared with: torch's dense kernels, FlashInfer where it is installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from bench.decode_cases import DecodeCase
from bench.decode_inputs import Cache, contiguous, page_lists

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}
FLASHINFER_DENSE, FLASHINFER_GIVEN = "flashinfer_paged", "flashinfer_selected_pages"
FLASHINFER_WORKSPACE_BYTES = 256 << 20

Call = Callable[[int], torch.Tensor]  # of set i; returns [B, Hq, Lq, D]


def attend_grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend: SDPBackend
) -> torch.Tensor:
    """GQA by enable_gqa, causal among the new queries."""
    mask = causal_lower_right(query.shape[2], key.shape[2]) if query.shape[2] > 1 else None
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=query.shape[1] != key.shape[1]
        )


def attend_packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend: SDPBackend
) -> torch.Tensor:
    """GQA with the heads of a group as query rows, which only a single query allows: several would
    need a mask."""
    batch, heads, query_len, dim = query.shape
    if query_len > 1:
        raise ValueError("heads as rows need one query")
    packed = query.reshape(batch, key.shape[1], -1, dim)
    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(packed, key, value)
    return out.reshape(batch, heads, 1, dim)


def sdpa(case: DecodeCase, caches: list[Cache]) -> dict[str, Call]:
    """Every backend and both ways of packing, on contiguous copies of the caches."""
    tensors = [(c.query, contiguous(case, c, c.key), contiguous(case, c, c.value)) for c in caches]

    def call(attend: Callable[..., torch.Tensor], backend: SDPBackend, i: int) -> torch.Tensor:
        return attend(*tensors[i % len(tensors)], backend)

    return {
        f"sdpa_{name}_{how}": functools.partial(call, attend, backend)
        for name, backend in BACKENDS.items()
        for how, attend in (("gqa", attend_grouped), ("rows", attend_packed))
    }


def flashinfer() -> Any:
    """The package; raises where it is not installed."""
    if importlib.util.find_spec("flashinfer") is None:
        raise RuntimeError("flashinfer is not installed")
    return importlib.import_module("flashinfer")


def flashinfer_wrapper(indptr: torch.Tensor, indices: torch.Tensor, **plan: Any) -> Any:
    """Its paged decode, planned once for full pages."""
    package = flashinfer()
    sequences = indptr.numel() - 1
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    last_page = torch.empty(sequences, dtype=torch.int32, device="cuda")
    wrapper = package.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "HND", use_cuda_graph=True, use_tensor_cores=True,
        paged_kv_indptr_buffer=torch.empty_like(indptr),
        paged_kv_indices_buffer=torch.empty_like(indices),
        paged_kv_last_page_len_buffer=last_page,
    )  # fmt: skip
    full = torch.full((sequences,), plan["page_size"], dtype=torch.int32, device="cuda")
    dtype = plan.pop("dtype")
    wrapper.plan(indptr, indices, full, q_data_type=dtype, kv_data_type=dtype, **plan)
    return wrapper


def evenly(sequences: int, pages: int) -> torch.Tensor:
    return torch.arange(0, sequences * pages + 1, pages, dtype=torch.int32, device="cuda")


def flashinfer_dense(case: DecodeCase, caches: list[Cache]) -> Call:
    """Paged decode over every key."""
    if case.query_len > 1:
        raise ValueError("its decode takes one query")
    wrappers = [
        flashinfer_wrapper(
            evenly(case.batch, case.max_pages), c.block_table.flatten(),
            num_qo_heads=case.heads, num_kv_heads=case.kv_heads, head_dim=case.head_dim,
            page_size=case.page_size, dtype=case.torch_dtype,
        )
        for c in caches
    ]  # fmt: skip

    def call(i: int) -> torch.Tensor:
        cache = caches[i % len(caches)]
        out = wrappers[i % len(caches)].run(cache.query[:, :, 0], (cache.key, cache.value))
        assert isinstance(out, torch.Tensor)
        return out.unsqueeze(2)

    return call


def flashinfer_given(case: DecodeCase, caches: list[Cache]) -> Call:
    """Paged decode of each KV head as a sequence of its own over the given pages of 16."""
    if case.page_size != 16 or case.query_len > 1:
        raise ValueError("pages of 16 tokens and one query")
    heads = torch.arange(case.kv_heads, device="cuda")
    wrappers = []
    for seed, cache in enumerate(caches):
        columns, _ = page_lists(case, seed)
        pages = cache.block_table.long()[:, None].expand(-1, case.kv_heads, -1).gather(2, columns)
        rows = (pages * case.kv_heads + heads[:, None]).to(torch.int32).flatten()
        wrappers.append(
            flashinfer_wrapper(
                evenly(case.rows, columns.shape[2]), rows,
                num_qo_heads=case.group, num_kv_heads=1, head_dim=case.head_dim,
                page_size=16, dtype=case.torch_dtype,
            )
        )  # fmt: skip

    def call(i: int) -> torch.Tensor:
        cache = caches[i % len(caches)]
        query = cache.query.view(case.rows, case.group, case.head_dim)
        key, value = (x.view(-1, 1, 16, case.head_dim) for x in (cache.key, cache.value))
        out = wrappers[i % len(caches)].run(query, (key, value))
        assert isinstance(out, torch.Tensor)
        return out.view(case.batch, case.heads, 1, case.head_dim)

    return call
