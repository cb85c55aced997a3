"""Elements more than 2^31 apart: strides only, the memory between them is never touched."""

from __future__ import annotations

import condensate_ext as ops
import pytest
import torch

from tests.testkit import oracle
from tests.testkit.cases import Case
from tests.testkit.definition import listed_blocks, support_of_lists

FAR = 2**31 + 64  # elements, a multiple of 16 bytes


def _far_apart(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """A copy whose neighbours along `dim` lie FAR elements apart."""
    strides = list(tensor.contiguous().stride())
    strides[dim] = FAR
    span = sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)) + 1
    try:
        buffer = torch.empty(span, dtype=tensor.dtype, device=tensor.device)
    except RuntimeError as error:
        pytest.skip(f"no {span * tensor.element_size() >> 30} GiB of address space: {error}")
    return torch.as_strided(buffer, tensor.shape, strides).copy_(tensor)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_strides_beyond_int32(device, dim):
    lengths = (3, 3) if dim == 2 else (70, 200)
    case = Case(
        device, dtype=torch.float16, batch=2, kv_heads=2, group=1, query_len=lengths[0],
        kv_len=lengths[1], topk=64,
    )  # fmt: skip
    near = case.tensors()
    query, key, value = (_far_apart(t, dim) for t in near)
    assert key.stride(dim) > 2**31
    lists = case.lists()
    out, lse = ops.block_sparse_attention(query, key, value, *lists, **case.attention_args)
    support = support_of_lists(case.ranges, listed_blocks(*lists, case.kv_len)[0], 2)
    oracle.assert_matches(oracle.attention(*near, support), out, lse)
    assert torch.equal(ops.block_summaries(key), ops.block_summaries(near[1]))
    for selector in ("block", "exact"):
        expected = ops.attention_forward(*near, topk=64, selector=selector, **case.attention_args)
        actual = ops.attention_forward(
            query, key, value, topk=64, selector=selector, **case.attention_args
        )
        assert all(map(torch.equal, expected, actual))
    assert torch.equal(ops.omitted_mass(query, key, lse), ops.omitted_mass(*near[:2], lse))
