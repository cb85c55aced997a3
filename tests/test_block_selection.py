"""select_blocks: the documented top-k of blocks, exactly so where scores are exact."""

from __future__ import annotations

import condensate_ext  # noqa: F401
import pytest
import torch

from tests.testkit import selection
from tests.testkit.cases import Case
from tests.testkit.definition import DTYPES

ops = torch.ops.condensate
SELECTORS = ("block", "quest", "mean")


def _integer_problem(case: Case, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key whose block scores are exact and take few values, so that most blocks tie.

    All keys of a block are equal, and one query serves every position: a block's mass is one
    exponential times its visible units, the same number wherever the block stands.
    """
    generator = torch.Generator().manual_seed(case.seed)
    blocks = -(-case.kv_len // 64)
    shape = (case.batch, case.kv_heads, blocks, 1)
    level = torch.randint(0, levels, shape, generator=generator)
    key = torch.zeros(case.batch, case.kv_heads, blocks, case.head_dim)
    key[..., :1] = level.float()
    key[..., 1:2] = 1.0
    query = torch.zeros(case.batch, case.query_heads, case.query_len, case.head_dim)
    query[..., :2] = 1.0
    keys = key.repeat_interleave(64, 2)[:, :, : case.kv_len]
    return tuple(t.to(case.dtype).to(case.device) for t in (query, keys))


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("query_len, group", [(1, 1), (4, 8), (150, 1), (70, 4), (33, 64)])
def test_ties_go_to_the_lower_index(device, seed, selector, dtype, causal, query_len, group):
    checked = 0
    for levels, topk in ((1, 128), (2, 256), (4, 448)):
        case = Case(
            device, seed, dtype, batch=2, kv_heads=2, group=group, query_len=query_len,
            kv_len=20 * 64, window=70, anchors=5, topk=topk, causal=causal, scale=0.5,
            selector=selector,
        )  # fmt: skip
        query, key = _integer_problem(case, levels)
        summaries = ops.block_summaries(key, selector=selector)
        indices, counts = ops.select_blocks(
            query, summaries, kv_len=case.kv_len, topk=topk, selector=selector, **case.range_args
        )
        mass = selection.masses(query, summaries, case.ranges, selector, case.scale)
        eligible = case.ranges.eligible(group)
        chosen = selection.check_form(indices, counts, eligible, topk // 64)
        expected, certain = selection.expected_lists(mass.per_tile, eligible, topk // 64)
        assert torch.equal(chosen[certain], expected[certain])
        checked += int(certain.sum())
        assert certain.float().mean() > 0.5
    assert checked > 0


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("kv_len", [1, 3, 4, 15, 16, 17, 63, 64, 65, 127, 500])
def test_summaries(device, selector, kv_len):
    for dtype in DTYPES:
        case = Case(device, dtype=dtype, batch=2, kv_heads=3, kv_len=kv_len, head_dim=72)
        key = case.tensors()[1]
        selection.check_summaries(key, ops.block_summaries(key, selector=selector), selector)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("group", [1, 4, 16])
def test_longer_contexts_take_the_heaviest_blocks(device, seed, selector, group):
    case = Case(
        device, seed, torch.bfloat16, group=group, query_len=40, kv_len=20_000, window=256,
        anchors=64, topk=1728, selector=selector, scale=0.2,
    )  # fmt: skip
    query, key, _ = case.tensors()
    summaries = ops.block_summaries(key, selector=selector)
    lists = ops.select_blocks(
        query, summaries, kv_len=case.kv_len, topk=1728, selector=selector, **case.range_args
    )
    mass = selection.masses(query, summaries, case.ranges, selector, case.scale)
    eligible = case.ranges.eligible(group)
    chosen = selection.check_lists(*lists, mass, eligible, 27)
    assert chosen.sum() == 27 * chosen.shape[:-1].numel() < eligible.sum() * chosen.shape[1]


def test_blocks_with_scores_that_are_not_finite_have_no_mass(device):
    case = Case(device, dtype=torch.float32, query_len=64, kv_len=1024, selector="block")
    query, key, _ = case.tensors()
    key[:, :, 5 * 64 + 9] = torch.nan
    key[:, :, 7 * 64] = torch.inf
    summaries = ops.block_summaries(key, selector="block")
    lists = ops.select_blocks(query, summaries, kv_len=1024, topk=256, **case.range_args)
    chosen = selection.check_form(*lists, case.ranges.eligible(1), 4)
    assert not chosen[..., 5].any() and not chosen[..., 7].any()
