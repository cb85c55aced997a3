"""select_blocks: the documented top-k of blocks, exactly so where scores are exact."""

from __future__ import annotations

from dataclasses import replace

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


def _lists(case: Case, query: torch.Tensor, key: torch.Tensor):
    """select_blocks of the case, its scores by the definition, and its lists."""
    summaries = ops.block_summaries(key, selector=case.selector)
    lists = ops.select_blocks(
        query, summaries, kv_len=case.kv_len, topk=case.topk, selector=case.selector,
        **case.range_args,
    )  # fmt: skip
    scores = selection.Scores(
        query, summaries, case.ranges, case.selector, case.scale,
        exact=case.content == "integers",
    )  # fmt: skip
    return scores, lists


def _check_estimate(
    case: Case, scores: selection.Scores, chosen: torch.Tensor, key: torch.Tensor
) -> None:
    """The estimate of the whole op, which makes the same lists."""
    query, value = scores.query, case.tensors()[2]
    estimate = ops.attention_forward(
        query, key, value, topk=case.topk, selector=case.selector, **case.attention_args
    )[2]
    if case.ranges.dense_is_faster(case.topk):
        assert not estimate.any()  # nothing is left out
    else:
        selection.check_estimate(scores, estimate, chosen, case.topk // 64)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("query_len, group", [(1, 1), (4, 8), (150, 1), (70, 4), (33, 64)])
@pytest.mark.parametrize("blocks", [20, 100])  # fewer than a shortlist holds, and more
def test_ties_go_to_the_lower_index(
    device, seed, selector, dtype, causal, query_len, group, blocks
):
    for levels, topk in ((1, 128), (2, 256), (4, 448)):
        case = Case(
            device, seed, dtype, batch=2, kv_heads=2, group=group, query_len=query_len,
            kv_len=blocks * 64, head_dim=16, window=70, anchors=5, topk=topk, causal=causal,
            scale=0.5, selector=selector, content="integers",
        )  # fmt: skip
        scores, lists = _lists(case, *_integer_problem(case, levels))
        chosen = selection.check_lists(scores, *lists, topk // 64)
        expected, certain = selection.expected_choice(scores, topk // 64)
        assert torch.equal(chosen[certain], expected[certain])
        assert certain.float().mean() > 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window, anchors", [(70, 5), (0, 0), (700, 130)])
@pytest.mark.parametrize("query_len, group", [(1, 4), (33, 8), (70, 1)])
def test_exact_scores_give_the_defined_lists(
    device, seed, dtype, causal, window, anchors, query_len, group
):
    """Small integers: means, pooled queries and scores are exact, so only sums round."""
    same = certainly = 0
    for n, kv_len in enumerate((40 * 64, 90 * 64 + 17, 100 * 64 - 1)):
        case = Case(
            device, seed + n, dtype, group=group, query_len=query_len, kv_len=kv_len, head_dim=16,
            window=window, anchors=anchors, topk=5 * 64, causal=causal, scale=2.0**-3,
            selector="block", content="integers",
        )  # fmt: skip
        query, key, _ = case.tensors()
        scores, lists = _lists(case, query, key)
        assert scores.scan_error < 3e-5 and scores.refinement_error < 3e-5
        chosen = selection.check_lists(scores, *lists, 5)
        expected, certain = selection.expected_choice(scores, 5)
        assert torch.equal(chosen[certain], expected[certain])
        same, certainly = same + int(certain.sum()), certainly + certain.numel()
        _check_estimate(case, scores, chosen, key)
    assert same > 0.5 * certainly


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("budget", [0, 1, 12, 40, 80])
@pytest.mark.parametrize(
    "query_len, kv_len, window, anchors",
    [
        (1, 11 * 64, 100, 70),  # fewer eligible blocks than most budgets
        (50, 60 * 64 + 5, 100, 70),  # no more than a shortlist holds
        (50, 110 * 64 + 37, 100, 70),
        (50, 110 * 64, 0, 0),
        (7, 110 * 64 + 63, 3000, 1),  # the walk reaches far beyond the shortlist
        (5000, 4800, 64, 64),  # queries before all keys
    ],
)
def test_every_size_of_shortlist(
    device, seed, dtype, causal, budget, query_len, kv_len, window, anchors
):
    case = Case(
        device, seed, dtype, group=2 if query_len < 1000 else 1, query_len=query_len,
        kv_len=kv_len, head_dim=32, window=window, anchors=anchors, topk=budget * 64,
        causal=causal, scale=0.5, selector="block",
    )  # fmt: skip
    query, key, _ = case.tensors()
    scores, lists = _lists(case, query, key)
    chosen = selection.check_lists(scores, *lists, budget)
    assert torch.equal(
        chosen.sum(-1), scores.eligible.sum(-1).clamp(max=budget).expand(chosen.shape[:-1])
    )
    _check_estimate(case, scores, chosen, key)


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
        device, seed, torch.bfloat16, group=group, query_len=41, kv_len=20_000, window=256,
        anchors=64, topk=1728, selector=selector, scale=0.2,
    )  # fmt: skip
    scores, lists = _lists(case, *case.tensors()[:2])
    chosen = selection.check_lists(scores, *lists, 27)
    assert chosen.sum() == 27 * chosen.shape[:-1].numel() < scores.eligible.sum() * chosen.shape[1]


# Keys enough for 2, 4 and 8 tiles to share a scan, and queries for a border of tiles inside a scan
# tile and, mostly, a last scan tile that is not full.
SHARED_SCANS = (
    {"query_len": 200, "kv_len": 2**18 + 65, "window": 0, "anchors": 5, "content": "integers"},
    {"query_len": 200, "kv_len": 2**18 + 1, "window": 150, "causal": False},
    {"query_len": 200, "kv_len": 280_000, "window": 280_000 - 63 * 64},  # all fit a shortlist
    {"query_len": 70, "kv_len": 300_000, "window": 40, "group": 8},
    {"query_len": 5, "kv_len": 2**19, "window": 0, "group": 40},
    {"query_len": 270, "kv_len": 2**19 + 1, "window": 90, "anchors": 70},
    {"query_len": 130, "kv_len": 2**19 + 999, "window": 70, "causal": False, "content": "integers"},
    {"query_len": 70, "kv_len": 2**20 + 1, "window": 0},
)


def _shared_scan_case(device: str, seed: int, **changes) -> Case:
    common = {"head_dim": 16, "topk": 5 * 64, "scale": 2.0**-3, "selector": "block"}
    return Case(device, seed, DTYPES[seed % 3], **(common | changes))


@pytest.mark.parametrize("changes", SHARED_SCANS)
def test_tiles_that_share_a_scan(device, seed, changes):
    """The last keys weigh most, so that shortlists name blocks that not every tile may list."""
    case = _shared_scan_case(device, seed, **changes)
    query, key, _ = case.tensors()
    key[:, :, -500:] *= 2.0
    scores, lists = _lists(case, query, key)
    chosen = selection.check_lists(scores, *lists, 5)
    if case.window < 0.8 * case.kv_len:  # else the op attends to everything
        _check_estimate(case, scores, chosen, key)
    if scores.exact:
        expected, certain = selection.expected_choice(scores, 5)
        assert torch.equal(chosen[certain], expected[certain])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shared_scan_lists_for_a_tile_only_what_it_may(device, dtype):
    """The hottest block lies in all windows of the first tile, and before one of the second's."""
    blocks = 4097
    case = Case(
        device, 0, dtype, group=4, query_len=64, kv_len=blocks * 64, head_dim=16, window=191,
        topk=5 * 64, selector="block",
    )  # fmt: skip
    query, key, _ = case.tensors()
    query.abs_()
    key[:, :, -3 * 64 : -2 * 64] = 4.0
    scores, lists = _lists(case, query, key)
    assert scores.eligible[:, -3].tolist() == [False, True]
    chosen = selection.check_lists(scores, *lists, 5)
    assert chosen[:, :, 1, -3].all() and not chosen[:, :, 0, -3].any()


@pytest.mark.parametrize("causal", [True, False])
def test_ties_in_a_shared_scan(device, seed, causal):
    """The last blocks tie above all others, of which the first fill the shortlist."""
    case = _shared_scan_case(
        device, seed, query_len=200, kv_len=2**18 + 33, window=70 * (not causal), causal=causal,
        topk=20 * 64, content="integers",
    )  # fmt: skip
    query, key = _integer_problem(case, 2)
    key[:, :, -600:, 0] = 3.0
    scores, lists = _lists(case, query, key)
    chosen = selection.check_lists(scores, *lists, 20)
    expected, certain = selection.expected_choice(scores, 20)
    assert torch.equal(chosen[certain], expected[certain])
    assert certain.all()
    shortlist = scores.to_tiles(
        selection.expected_lists(scores.scanned, scores.scan_eligible, 64)[0]
    )
    assert (shortlist & ~scores.eligible).any(), "all of a shortlist is eligible for all tiles"


def _one_channel(case: Case, levels: torch.Tensor, queries: list[float]):
    """Lists where channel 0 alone carries the scores; `levels` [kv_len] are the keys' in it."""
    query = torch.zeros(1, 1, case.query_len, case.head_dim)
    key = torch.zeros(1, 1, case.kv_len, case.head_dim)
    query[0, 0, :, 0], key[0, 0, :, 0] = torch.tensor(queries), levels
    scores, (indices, counts) = _lists(
        case, query.to(case.dtype).to(case.device), key.to(case.dtype).to(case.device)
    )
    return scores, indices, counts


def _one_channel_case(device: str, dtype: torch.dtype, blocks: int, **changes) -> Case:
    common = {"window": 1, "anchors": 0, "topk": 64, "scale": 1.0, "head_dim": 16}
    return Case(
        device, dtype=dtype, kv_len=blocks * 64, selector="block", content="integers",
        **(common | {"query_len": 1} | changes),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_fine_units_rank_the_shortlist_and_nothing_else(device, dtype):
    """Keys that cancel within every middle unit: the scan sees nothing, the refinement much."""
    for blocks, expected in ((60, 55), (100, 0)):  # all of 60 are on the shortlist; of 100, 64
        levels = torch.ones(blocks, 4, 4, 4)  # middle, fine, keys
        levels[-5] = torch.tensor([16.0, -6.0, -6.0, -6.0])[None, :, None]
        case = _one_channel_case(device, dtype, blocks)
        scores, indices, counts = _one_channel(case, levels.flatten(), [1.0])
        assert indices.flatten().tolist() == [expected], blocks
        selection.check_lists(scores, indices, counts, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_of_queries_that_cancel_in_the_scan_are_refined_apart(device, dtype):
    levels = torch.zeros(60, 64)
    levels[33] = 8.0
    case = _one_channel_case(device, dtype, 60, query_len=4, window=4)
    scores, indices, counts = _one_channel(case, levels.flatten(), [1.0, 1.0, -1.0, -1.0])
    assert indices.flatten().tolist() == [33]
    selection.check_lists(scores, indices, counts, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_without_a_middle_unit_has_no_masses(device, dtype):
    """The query at position 10 sees fine units but nothing to divide their sum by."""
    case = replace(_one_channel_case(device, dtype, 2, query_len=64), kv_len=74)
    levels = torch.zeros(74)
    levels[:8], levels[64:] = -8.0, 8.0
    scores, indices, counts = _one_channel(case, levels, [-1.0] + [1.0] * 63)
    assert indices.flatten().tolist() == [1]
    selection.check_lists(scores, indices, counts, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masses_that_overflow_tie(device, dtype):
    levels = torch.zeros(60, 16, 4)
    levels[10, :2] = torch.tensor([[200.0], [-200.0]])
    levels[20, :2] = torch.tensor([[300.0], [-300.0]])
    levels[30, :2] = torch.tensor([[50.0], [-50.0]])
    for topk, expected in ((64, [10]), (128, [10, 20]), (192, [10, 20, 30])):
        case = _one_channel_case(device, dtype, 60, topk=topk)
        scores, indices, counts = _one_channel(case, levels.flatten(), [1.0])
        assert indices.flatten().tolist() == expected
        selection.check_lists(scores, indices, counts, topk // 64)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("blocks, causal", [(30, True), (100, True), (100, False)])
def test_keys_that_are_not_finite(device, seed, selector, bad, blocks, causal):
    """A query that sees a score of NaN or +inf has no masses; the others rank as ever."""
    for query_len, at in ((1, 20), (33, 20), (64, blocks - 1), (64, 2)):
        case = Case(
            device, seed, torch.float32, query_len=query_len, kv_len=blocks * 64, head_dim=16,
            window=20, anchors=8, topk=4 * 64, causal=causal, scale=2.0**-3, selector=selector,
            content="integers",
        )  # fmt: skip
        query, key, value = case.tensors()
        key[:, :, at * 64 + 37] = bad
        scores, lists = _lists(case, query, key)
        chosen = selection.check_lists(scores, *lists, 4)
        expected, certain = selection.expected_choice(scores, 4)
        assert torch.equal(chosen[certain], expected[certain])
        estimate = ops.attention_forward(
            query, key, value, topk=case.topk, selector=selector, **case.attention_args
        )[2]
        assert ((estimate >= 0) & (estimate <= 1)).all()


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_lone_query_that_sees_a_nan_lists_the_lowest_blocks(device, selector):
    case = Case(
        device, dtype=torch.float32, query_len=1, kv_len=1024, anchors=70, topk=256,
        selector=selector,
    )  # fmt: skip
    query, key, _ = case.tensors()
    key[:, :, 9 * 64 + 9] = torch.nan
    _, (indices, counts) = _lists(case, query, key)
    assert indices.flatten().tolist() == [1, 2, 3, 4] and counts.item() == 4
