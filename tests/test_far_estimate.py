"""omitted_mass_estimate of calls with far field, which the attention takes from its own scores."""

from __future__ import annotations

import math
from dataclasses import replace

import condensate_ext
import condensate_ext as ops
import pytest
import torch
from torch import Tensor

from tests.test_paths import path_of, runs_on
from tests.testkit import far_field, oracle, selection
from tests.testkit.cases import Case
from tests.testkit.checks import check_estimate, far_estimate, scored_lists
from tests.testkit.definition import DTYPES, tile_positions

# Blocks of a list, and the places of those that are sampled.
SAMPLES = {3: [0, 1, 2], 8: [*range(8)], 9: [0, 2, 4, 6, 8], 20: [0, 3, 6, 9, 12, 15, 18]}


def _forward(case: Case, qkv: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, estimate = ops.attention_forward(*qkv, **case.selection_args, **case.attention_args)
    return out, lse, estimate


def _chosen(case: Case, query: Tensor, key: Tensor) -> Tensor:
    """The blocks that the call lists, bool [B, Hkv, T, blocks]."""
    summaries = ops.block_summaries(key, selector=case.selector)
    scores, lists = scored_lists(case, query, summaries, key)
    return selection.check_form(*lists, scores.eligible, case.budget.width)


def _check(case: Case, qkv: tuple[Tensor, Tensor, Tensor]) -> tuple[far_field.Estimate, Tensor]:
    """The estimate by the definition and the call's own, which agree."""
    estimate = _forward(case, qkv)[2]
    assert condensate_ext.last_plan().selection == "blocks"
    expected = far_estimate(case, _chosen(case, *qkv[:2]), qkv)
    far_field.check_estimate(expected, estimate)
    return expected, estimate


# ---- The definition ----


@pytest.mark.parametrize("choice", [0, 1, 2])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_it_is_the_defined_one_on_every_path(device, seed, monkeypatch, choice, group, head_dim):
    path = path_of(device, choice)
    monkeypatch.setenv("CONDENSATE_FORCE_PATH", path)
    checked = 0
    for index, listed in enumerate((0, *SAMPLES)):
        case = Case(
            device, seed + index, (torch.bfloat16, torch.float16)[index % 2], group=group,
            kv_heads=2 - index % 2, query_len=tile_positions(group) + 7,
            kv_len=44 * 64 - (0, 1, 37)[index % 3], head_dim=head_dim,
            window=(20, 0, 64, 65, 1)[index], anchors=(3, 0, 64, 0, 70)[index], topk=listed * 64,
            causal=index % 4 < 2, far_field=True,
            selector=("block", "block", "mean", "block", "block")[index],
        )  # fmt: skip
        if not runs_on(case, path):
            continue
        checked += 1
        expected, estimate = _check(case, case.tensors())
        assert (expected.most - expected.least).max() < 0.02
        assert (estimate > 0.2).any()
    assert checked == 5 or (path == "sm90" and head_dim == 256)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selector", ["block", "quest", "mean"])
@pytest.mark.parametrize("causal", [True, False])
def test_every_dtype_and_selector(device, seed, dtype, selector, causal):
    for scale, listed in ((None, 9), (0.5, 17)):
        case = Case(
            device, seed, dtype, group=2, query_len=130, kv_len=50 * 64 + 5, window=70, anchors=9,
            topk=listed * 64, causal=causal, scale=scale, selector=selector, far_field=True,
        )  # fmt: skip
        _check(case, case.tensors())


@pytest.mark.parametrize("blocks", [129, 260])
@pytest.mark.parametrize("causal", [True, False])
def test_pools_of_several_blocks(device, seed, blocks, causal):
    case = Case(
        device, seed, torch.float16, group=4, query_len=70, kv_len=blocks * 64 - 5, topk=11 * 64,
        causal=causal, selector="block", far_field=True,
    )  # fmt: skip
    _check(case, case.tensors())


@pytest.mark.parametrize("causal", [True, False])
def test_without_a_window_blocks_of_the_tile_itself_are_listed_and_not_sampled(device, causal):
    """They weigh most, so that lists name them, also the short one at the end."""
    for kv_len in (40 * 64, 40 * 64 - 5):
        case = Case(
            device, dtype=torch.float16, group=2, query_len=130, kv_len=kv_len, window=0, anchors=0,
            topk=4 * 64, causal=causal, selector="block", far_field=True,
        )  # fmt: skip
        query, key, value = case.tensors()
        query.abs_()
        key[:, :, -130:].abs_()
        assert _chosen(case, query, key)[:, :, -1, -1].all()
        _check(case, (query, key, value))


@pytest.mark.parametrize("top_p", [None, 0.6])
def test_lists_shorter_than_their_places(device, seed, top_p):
    case = Case(
        device, seed, torch.float16, batch=2, kv_heads=4, group=2, query_len=70, kv_len=60 * 64,
        topk=20 * 64, topk_per_head=(64, 11 * 64, 2**31 - 1, 0), top_p=top_p, selector="block",
        scale=0.3, far_field=True,
    )  # fmt: skip
    counts = _chosen(case, *case.tensors()[:2]).sum(-1)
    assert (counts == 0).any() and (counts % 20 > 8).any()
    _check(case, case.tensors())


def test_early_rows_that_attend_all_they_see_omit_nothing(device):
    case = Case(
        device, dtype=torch.float16, group=2, query_len=1000, kv_len=1000, window=20, topk=3 * 64,
        selector="block", far_field=True,
    )  # fmt: skip
    _, estimate = _check(case, case.tensors())
    assert not estimate[:, :, : 4 * 64].any() and (estimate[:, :, 7 * 64 :] > 0.1).all()


def test_it_repeats_to_the_bit_and_does_not_see_its_batch(device, seed):
    for dtype in DTYPES:
        case = Case(
            device, seed, dtype, batch=3, kv_heads=2, group=4, query_len=90, kv_len=4000,
            topk=9 * 64, selector="block", far_field=True,
        )  # fmt: skip
        query, key, value = case.tensors()
        estimate = _forward(case, (query, key, value))[2]
        assert torch.equal(_forward(case, (query, key, value))[2], estimate)
        alone = _forward(case, (query[1:2, 4:], key[1:2, 1:], value[1:2, 1:]))[2]
        assert torch.equal(alone, estimate[1:2, 4:])


@pytest.mark.parametrize("condenses", [True, False])
@pytest.mark.parametrize("query_len", [1, 2])
def test_of_a_single_query_and_without_far_field_it_is_the_selections(
    device, seed, query_len, condenses
):
    case = Case(
        device, seed, torch.float16, group=4, query_len=query_len, kv_len=6000, topk=5 * 64,
        scale=0.25, selector="block", far_field=condenses,
    )  # fmt: skip
    query, key, value = case.tensors()
    summaries = ops.block_summaries(key, selector="block")
    scores, lists = scored_lists(case, query, summaries, key)
    chosen = selection.check_lists(scores, *lists, case.budget)
    estimate = _forward(case, (query, key, value))[2]
    check_estimate(case, scores, chosen, (query, key, value), estimate)
    # Which one it is can be told.
    by_selection = selection.estimated_omission(scores, chosen, case.budget)[0]
    by_attention = far_estimate(case, chosen, (query, key, value)).share
    assert (by_selection - by_attention).abs().max() > 0.01


def test_it_is_of_the_attended_keys_alone(device, seed):
    """Close to the audit of the support; the far field's log-sum-exp has the condensed keys too."""
    case = Case(
        device, seed, torch.bfloat16, group=4, query_len=90, kv_len=6000, topk=11 * 64,
        selector="block", far_field=True,
    )  # fmt: skip
    query, key, value = case.tensors()
    _, lse, estimate = _forward(case, (query, key, value))
    division = far_field.divide(case.ranges, _chosen(case, query, key), case.query_heads)
    support = oracle.attention(query, key, value, division.attended).lse
    omitted = oracle.omitted_mass(query, key, support, case.ranges.visible())
    assert (estimate - omitted).abs().mean() < 0.01 and (omitted > 0.5).all()
    assert (ops.omitted_mass(query, key, lse) < 0.7 * omitted).all()


# ---- Planted contents, of which the estimate is known ----


def _planted(case: Case, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors whose first channels hold `queries` [Lq, C] and `keys` [Lk, C]."""
    query, key, value = (t.contiguous() for t in case.tensors())
    for tensor, rows in ((query, queries), (key, keys)):
        tensor.zero_()
        tensor[..., : rows.shape[1]] = rows.to(tensor)
    return query, key, value


def _plain_case(device: str, dtype: torch.dtype, **changes: object) -> Case:
    """40 blocks, without ranges: what is not listed is condensed."""
    common: dict[str, object] = {
        "group": 2, "query_len": 70, "kv_len": 40 * 64, "window": 0, "anchors": 0,
        "causal": False, "scale": 1.0, "selector": "block", "far_field": True,
    }  # fmt: skip
    return Case(device, dtype=dtype, **(common | changes))  # type: ignore[arg-type]


def _spread(mean: float, width: float) -> Tensor:
    """Scores of a block whose short units all have the same mean; its gap is log cosh width."""
    return mean + width * torch.tensor([1.0, -1.0]).repeat(32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [40, 200])
def test_of_equal_keys_in_every_pool_it_is_the_omitted_mass(device, dtype, blocks):
    case = Case(
        device, dtype=dtype, group=2, query_len=70, kv_len=blocks * 64, window=64, anchors=9,
        topk=9 * 64, selector="block", far_field=True,
    )  # fmt: skip
    query, key, value = (t.contiguous() for t in case.tensors())
    equal = 64 * far_field.pool_blocks(case.kv_len)
    key = key[:, :, ::equal].repeat_interleave(equal, 2)
    _, estimate = _check(case, (query, key, value))
    division = far_field.divide(case.ranges, _chosen(case, query, key), case.query_heads)
    support = oracle.attention(query, key, value, division.attended).lse
    omitted = oracle.omitted_mass(query, key, support, case.ranges.visible())
    assert (estimate - omitted).abs().max() < 2e-5 and (omitted > 0.1).any()


@pytest.mark.parametrize("choice", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pools_are_raised_by_the_gap(device, monkeypatch, choice, dtype):
    """All blocks are alike: as many are omitted as are not listed. Their keys weigh ten times what
    their mean does."""
    path = path_of(device, choice)
    monkeypatch.setenv("CONDENSATE_FORCE_PATH", path)
    case = _plain_case(device, dtype, topk=5 * 64)
    if not runs_on(case, path):
        pytest.skip(f"{path} does not take {dtype}")
    query = torch.ones(case.query_len, 1)
    _, estimate = _check(case, _planted(case, query, _spread(0.0, 3.0).repeat(40)[:, None]))
    assert (estimate - 35 / 40).abs().max() < 2e-5


@pytest.mark.parametrize("choice", [0, 1, 2])
@pytest.mark.parametrize("listed", SAMPLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gap_is_that_of_the_sampled_blocks(device, monkeypatch, choice, listed, dtype):
    """Listed blocks have a gap where they are sampled, or where they are not."""
    path = path_of(device, choice)
    monkeypatch.setenv("CONDENSATE_FORCE_PATH", path)
    case = _plain_case(device, dtype, topk=listed * 64)
    if not runs_on(case, path):
        pytest.skip(f"{path} does not take {dtype}")
    places = [2 * n + 1 for n in range(listed)] if listed < 20 else [*range(5, 25)]
    for width, other_width in ((2.0, 0.0), (0.0, 2.0)):
        blocks = torch.zeros(40, 64)
        for n, block in enumerate(places):
            blocks[block] = _spread(1.0, width if n in SAMPLES[listed] else other_width)
        qkv = _planted(case, torch.ones(case.query_len, 1), blocks.view(-1, 1))
        chosen = _chosen(case, *qkv[:2])
        assert chosen.nonzero()[:, -1].unique().tolist() == places
        _, estimate = _check(case, qkv)
        kept = blocks[places].double().exp().sum()
        pools = 64 * (40 - listed) * math.cosh(width)
        assert (estimate - pools / (kept + pools)).abs().max() < 2e-5


@pytest.mark.parametrize("choice", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level, counts", [(-20.0, True), (-60.0, False)])
def test_a_block_that_weighs_nothing_does_not_count(
    device, monkeypatch, choice, dtype, level, counts
):
    """Half of the queries ask for the listed block. To the others it is far lighter than the
    anchors, which are as light as what is condensed."""
    path = path_of(device, choice)
    monkeypatch.setenv("CONDENSATE_FORCE_PATH", path)
    case = _plain_case(device, dtype, topk=64, anchors=64)
    if not runs_on(case, path):
        pytest.skip(f"{path} does not take {dtype}")
    asks = torch.arange(case.query_len)[:, None] % 16 < 8
    blocks = torch.zeros(40, 64, 2)
    blocks[7, :, 0], blocks[7, :, 1] = 20.0, _spread(level, 3.0)
    qkv = _planted(case, torch.cat([asks, ~asks], 1).float(), blocks.flatten(0, 1))
    _, estimate = _check(case, qkv)
    pools = 38 * (math.cosh(3.0) if counts else 1.0)
    others = estimate[:, :, ~asks[:, 0].to(device)]
    assert (others - pools / (1 + pools)).abs().max() < 2e-5
    assert estimate[:, :, asks[:, 0].to(device)].max() < 1e-6


# ---- What is not finite ----


@pytest.mark.parametrize("choice", [0, 1, 2])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [640, 2500, 2559])
def test_rows_that_see_nan_omit_nothing(device, monkeypatch, choice, bad, at):
    """In a block far before, in one that only some rows see, in the last key."""
    path = path_of(device, choice)
    monkeypatch.setenv("CONDENSATE_FORCE_PATH", path)
    case = Case(
        device, dtype=torch.float16, group=2, query_len=130, kv_len=40 * 64, window=30, anchors=9,
        topk=9 * 64, selector="block", far_field=True,
    )  # fmt: skip
    query, key, value = case.tensors()
    key[:, :, at, 3] = bad
    lse = _forward(case, (query, key, value))[1]
    _, estimate = _check(case, (query, key, value))
    assert not estimate[lse.isnan()].any()
    assert bad == -torch.inf or lse.isnan().any()
    seen = case.ranges.visible()[:, at]
    assert (estimate[:, :, ~seen] > 0.1).all()


def test_a_query_of_nan_omits_nothing(device):
    case = Case(
        device, dtype=torch.float32, query_len=70, kv_len=40 * 64, topk=9 * 64, selector="block",
        far_field=True,
    )  # fmt: skip
    query, key, value = case.tensors()
    query[:, :, 33, 3] = torch.nan
    _, estimate = _check(case, (query, key, value))
    assert (estimate == 0).nonzero()[:, -1].tolist() == [33]


@pytest.mark.parametrize("choice", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pools_of_a_small_share_count(device, seed, monkeypatch, choice, dtype):
    """Far below the last bit of the sum, but for the gap: its keys spread far, the pools do not."""
    path = path_of(device, choice)
    monkeypatch.setenv("CONDENSATE_FORCE_PATH", path)
    case = Case(
        device, seed, dtype, group=2, query_len=96, kv_len=60 * 64, head_dim=128, topk=9 * 64,
        scale=1.0, selector="block", far_field=True,
    )  # fmt: skip
    if not runs_on(case, path):
        pytest.skip(f"{path} does not take {dtype}")
    expected, estimate = _check(case, case.tensors())
    sure = expected.most - expected.least < 0.1
    assert sure.double().mean() > 0.9 and expected.share.mean() > 0.05
    assert (estimate[sure] > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_leave_it_a_share(device, seed, dtype):
    """Of the sampled blocks most are lost beside the largest score."""
    case = Case(
        device, seed, dtype, group=4, query_len=130, kv_len=60 * 64, topk=9 * 64, selector="block",
        scale=4.0, far_field=True,
    )  # fmt: skip
    _check(case, case.tensors())
    _check(replace(case, scale=100.0), case.tensors())
