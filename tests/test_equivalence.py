"""Results that must coincide: with dense attention, with a second run, alone and in a batch."""

from __future__ import annotations

import condensate_ext as ops
import pytest
import torch
from torch import Tensor

from tests.testkit import oracle
from tests.testkit.cases import Case
from tests.testkit.definition import DTYPES

SELECTORS = ("block", "quest", "mean", "exact")


def _forward(case: Case, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, estimate = ops.attention_forward(
        *tensors, topk=case.topk, selector=case.selector, **case.attention_args
    )
    return out, lse, estimate


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_budget_over_context_is_dense_attention(device, seed, selector, causal, dtype):
    for query_len, kv_len in ((1, 300), (150, 300), (300, 100)):
        case = Case(
            device, seed, dtype, batch=2, kv_heads=2, group=2, query_len=query_len,
            kv_len=kv_len, topk=320, causal=causal, selector=selector,
        )  # fmt: skip
        tensors = case.tensors()
        out, lse, estimate = _forward(case, *tensors)
        oracle.assert_matches(oracle.attention(*tensors, case.ranges.visible()), out, lse)
        assert (estimate == 0).all()


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_repeat_to_the_bit_and_do_not_see_their_batch(device, seed, selector, dtype):
    case = Case(
        device, seed, dtype, batch=3, kv_heads=2, group=4, query_len=90, kv_len=500,
        topk=128, selector=selector, layouts=("transposed",) * 3,
    )  # fmt: skip
    tensors = case.tensors()
    first = _forward(case, *tensors)
    for _ in range(3):
        assert all(map(torch.equal, first, _forward(case, *tensors)))
    for b in range(3):
        for h in range(2):
            heads = slice(4 * h, 4 * h + 4)
            alone = _forward(
                case,
                tensors[0][b : b + 1, heads],
                *(t[b : b + 1, h : h + 1] for t in tensors[1:]),
            )
            for whole, part in zip(first, alone, strict=True):
                assert torch.equal(whole[b : b + 1, heads], part)


@pytest.mark.parametrize("selector", SELECTORS)
def test_attention_is_the_output_of_attention_forward(device, selector):
    case = Case(device, dtype=torch.bfloat16, group=2, query_len=90, kv_len=700, selector=selector)
    tensors = case.tensors()
    out = ops.attention(*tensors, topk=64, selector=selector, **case.attention_args)
    assert torch.equal(out, _forward(case, *tensors)[0])


@pytest.mark.parametrize("selector", ("block", "quest", "mean"))
def test_attention_is_its_stages_one_after_another(device, selector):
    case = Case(device, dtype=torch.float16, group=4, query_len=90, kv_len=900, selector=selector)
    query, key, value = case.tensors()
    lists = ops.select_blocks(
        query, ops.block_summaries(key, selector=selector), kv_len=900, topk=64,
        selector=selector, **case.attention_args,
    )  # fmt: skip
    staged = ops.block_sparse_attention(query, key, value, *lists, **case.attention_args)
    assert all(map(torch.equal, staged, _forward(case, query, key, value)[:2]))


def test_exact_rows_do_not_see_later_tokens(device):
    case = Case(device, dtype=torch.bfloat16, query_len=300, kv_len=300, selector="exact")
    tensors = case.tensors()
    expected = _forward(case, *tensors)
    for tensor in tensors:
        tensor[:, :, 200:] *= -30.0
    for before, after in zip(expected, _forward(case, *tensors), strict=True):
        assert torch.equal(before[:, :, :200], after[:, :, :200])
        assert not torch.equal(before[:, :, 200:], after[:, :, 200:])
