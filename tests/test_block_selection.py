"""select_blocks: the documented top-k of blocks, exactly so where scores are exact."""

from __future__ import annotations

import itertools
from dataclasses import replace

import condensate_ext as ops
import pytest
import torch

from tests.testkit import selection
from tests.testkit.cases import Case
from tests.testkit.checks import check_estimate, scored_lists
from tests.testkit.definition import DTYPES

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


def _lists(case: Case, query: torch.Tensor, key: torch.Tensor, *, refined: bool = True):
    """The case's scores by the definition, and its lists: those of attention, for which a single
    query is `refined` by the keys, or those from the summaries alone."""
    summaries = ops.block_summaries(key, selector=case.selector)
    return scored_lists(case, query, summaries, key if refined else None)


def _check_exact_lists(
    case: Case, query: torch.Tensor, key: torch.Tensor, *, refined: bool = True
) -> tuple[selection.Scores, torch.Tensor, torch.Tensor]:
    """The defined lists wherever rounding does not decide; chosen blocks and "is it certain?"."""
    scores, lists = _lists(case, query, key, refined=refined)
    chosen = selection.check_lists(scores, *lists, case.budget)
    expected, certain = selection.expected_choice(scores, case.budget)
    assert torch.equal(chosen[certain], expected[certain])
    return scores, chosen, certain


def _check_estimate(
    case: Case, scores: selection.Scores, chosen: torch.Tensor, key: torch.Tensor
) -> None:
    """The estimate of the whole op, which makes the same lists."""
    qkv = scores.query, key, case.tensors()[2]
    estimate = ops.attention_forward(*qkv, **case.selection_args, **case.attention_args)[2]
    if case.ranges.dense_is_faster(case.topk) and case.topk_per_head is None:
        assert not estimate.any()  # nothing is left out
    else:
        check_estimate(case, scores, chosen, qkv, estimate)


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
        for refined in (False, True)[query_len > 1 :]:
            problem = _integer_problem(case, levels)
            certain = _check_exact_lists(case, *problem, refined=refined)[2]
            assert certain.float().mean() > 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window, anchors", [(70, 5), (0, 0), (700, 130)])
@pytest.mark.parametrize("query_len, group", [(1, 4), (33, 8), (68, 1), (5, 40)])
def test_exact_scores_give_the_defined_lists(
    device, seed, dtype, causal, window, anchors, query_len, group
):
    """Small integers: means, pooled queries and scores are exact, so only sums round. The last pool
    holds a power of two queries, for thirds would round."""
    same = certainly = 0
    for n, kv_len in enumerate((40 * 64, 90 * 64 + 17, 100 * 64 - 1)):
        case = Case(
            device, seed + n, dtype, group=group, query_len=query_len, kv_len=kv_len, head_dim=16,
            window=window, anchors=anchors, topk=5 * 64, causal=causal, scale=2.0**-3,
            selector="block", content="integers",
        )  # fmt: skip
        query, key, _ = case.tensors()
        scores, chosen, certain = _check_exact_lists(case, query, key)
        assert scores.scan_error < 3e-5
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
    chosen = selection.check_lists(scores, *lists, case.budget)
    _check_estimate(case, scores, chosen, key)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("kv_len", [1, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 500])
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
    chosen = selection.check_lists(scores, *lists, case.budget)
    assert chosen.sum() == 27 * chosen.shape[:-1].numel() < scores.eligible.sum() * chosen.shape[1]


# Keys enough for 2, 4 and 8 tiles to share a scan, and queries for a border of tiles inside a scan
# tile and, mostly, a last scan tile that is not full.
SHARED_SCANS = (
    {"query_len": 200, "kv_len": 2**18 + 65, "window": 0, "anchors": 5, "content": "integers"},
    {"query_len": 200, "kv_len": 2**18 + 1, "window": 150, "causal": False},
    {"query_len": 200, "kv_len": 280_000, "window": 280_000 - 63 * 64},  # all fit a shortlist
    {"query_len": 70, "kv_len": 300_000, "window": 40, "group": 8},
    {"query_len": 70, "kv_len": 300_000, "kv_heads": 2, "top_p": 0.6, "topk_per_head": (0, 130)},
    {"query_len": 1, "kv_len": 300_005, "group": 4, "content": "integers"},
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
    for refined in (False, True)[changes["query_len"] > 1 :]:
        scores, lists = _lists(case, query, key, refined=refined)
        chosen = selection.check_lists(scores, *lists, case.budget)
        if scores.exact:
            expected, certain = selection.expected_choice(scores, case.budget)
            assert torch.equal(chosen[certain], expected[certain])
    if case.window < 0.8 * case.kv_len:  # else the op attends to everything
        _check_estimate(case, scores, chosen, key)


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
    chosen = selection.check_lists(scores, *lists, case.budget)
    assert chosen[:, :, 1, -3].all() and not chosen[:, :, 0, -3].any()


@pytest.mark.parametrize("kv_len", [700, 2**18 + 77])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("query_len", [1, 130])
def test_for_a_far_field_nothing_is_listed_that_is_attended_as_a_whole(
    device, seed, query_len, causal, kv_len
):
    """The hottest blocks hold the windows' edges and the last anchors: only the lists of an
    attention that attends no more of them than that name them."""
    case = Case(
        device, seed, torch.float16, kv_heads=1, group=2, query_len=query_len, kv_len=kv_len,
        head_dim=16, window=150, anchors=100, topk=4 * 64, causal=causal, selector="block",
    )  # fmt: skip
    query, key, _ = case.tensors()
    query.abs_()
    key[:, :, 64:128] = key[:, :, -500:] = 3.0
    scores, lists = _lists(case, query, key)
    walked = selection.check_lists(scores, *lists, case.budget) & scores.beside
    assert walked.any()
    scores, lists = _lists(replace(case, far_field=True), query, key)
    assert not (selection.check_lists(scores, *lists, case.budget) & scores.beside).any()


@pytest.mark.parametrize("causal", [True, False])
def test_ties_in_a_shared_scan(device, seed, causal):
    """The last blocks tie above all others, of which the first fill the shortlist."""
    case = _shared_scan_case(
        device, seed, query_len=200, kv_len=2**18 + 33, window=70 * (not causal), causal=causal,
        topk=20 * 64, content="integers",
    )  # fmt: skip
    query, key = _integer_problem(case, 2)
    key[:, :, -600:, 0] = 3.0
    scores, _, certain = _check_exact_lists(case, query, key)
    assert certain.all()
    shortlist = scores.to_tiles(selection.expected_shortlist(scores, case.budget)[0])
    assert (shortlist & ~scores.eligible).any(), "all of a shortlist is eligible for all tiles"


def _one_channel_case(device: str, dtype: torch.dtype, blocks: int, **changes) -> Case:
    common = {"window": 1, "anchors": 0, "topk": 64, "scale": 1.0, "head_dim": 16}
    return Case(
        device, dtype=dtype, content="integers",
        **(common | {"query_len": 1, "kv_len": blocks * 64, "selector": "block"} | changes),
    )  # fmt: skip


def _check_one_channel(
    case: Case, levels: torch.Tensor, queries: list[float], expected: list, *, refined: bool = True
) -> None:
    """Lists where channel 0 alone carries the scores; `levels` [kv_len] are the keys' in it.
    `expected` are the blocks of every tile."""
    query = torch.zeros(1, 1, case.query_len, case.head_dim)
    key = torch.zeros(1, 1, case.kv_len, case.head_dim)
    query[0, 0, :, 0], key[0, 0, :, 0] = torch.tensor(queries), levels.flatten()
    query, key = (t.to(case.dtype).to(case.device) for t in (query, key))
    scores, (indices, counts) = _lists(case, query, key, refined=refined)
    selection.check_lists(scores, indices, counts, case.budget)
    rows = zip(indices[0, 0].tolist(), counts[0, 0].tolist(), strict=True)
    assert [row[:count] for row, count in rows] == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_rank_the_shortlist_of_a_single_query_and_nothing_else(device, dtype):
    """Keys that cancel within every short unit: the scan sees nothing, the refinement much."""
    for blocks, found in ((60, 55), (100, 0)):  # all of 60 are on the shortlist; of 100, 64
        levels = torch.ones(blocks, 8, 8)
        levels[-5] = torch.tensor([16.0, -6.0, -6.0, 4.0, 0.0, 0.0, 0.0, 0.0])
        case = _one_channel_case(device, dtype, blocks)
        _check_one_channel(case, levels, [1.0], [[found]])
        _check_one_channel(case, levels, [1.0], [[0]], refined=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("query_len", [1, 8])
def test_the_scan_takes_hottest_units_and_the_refinement_all_of_a_block(device, dtype, query_len):
    levels = torch.zeros(60, 8, 8)
    levels[20], levels[33, 0], levels[33, 1:] = 7.0, 8.0, -2.0
    case = _one_channel_case(device, dtype, 60, query_len=query_len, window=query_len)
    queries = [1.0] * query_len
    _check_one_channel(case, levels, queries, [[33]], refined=False)
    _check_one_channel(case, levels, queries, [[20 if query_len == 1 else 33]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_queries_make_one(device, dtype):
    levels = torch.zeros(60, 64)
    levels[33] = 8.0
    case = _one_channel_case(device, dtype, 60, query_len=16, window=16)
    _check_one_channel(case, levels, [1.0] * 4 + [-1.0] * 4 + [0.0] * 8, [[0]])
    _check_one_channel(case, levels, [1.0] * 8 + [-1.0] * 8, [[33]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shared_scan_averages_more_queries_than_its_refinement(device, dtype):
    """Queries that cancel in the scan: of its ties the lowest 64 blocks are refined."""
    for hot, found in ((33, 33), (70, 0)):
        levels = torch.zeros(2**12 + 1, 64)
        levels[hot] = 8.0
        case = _one_channel_case(device, dtype, 2**12 + 1, query_len=16, window=16)
        _check_one_channel(case, levels, [1.0] * 8 + [-1.0] * 8, [[found]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_without_a_coarse_unit_has_no_masses(device, dtype):
    """Queries before position 63 see short units but nothing to divide by."""
    case = _one_channel_case(device, dtype, 2, query_len=64, kv_len=74)
    levels = torch.zeros(74)
    levels[:8], levels[64:72], levels[72:] = -8.0, 8.0, -8.0
    _check_one_channel(case, levels, [-1.0] * 8 + [1.0] * 56, [[1]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("refined", [False, True])
def test_masses_that_overflow_tie(device, dtype, refined):
    """Keys cancel in what their block is divided by."""
    levels = torch.zeros(60, 8, 8)
    for block, level in ((10, 200.0), (20, 300.0), (30, 50.0)):
        units = levels[block].mT if refined else levels[block]
        units[0], units[1] = level, -level
    for topk, found in ((64, [10]), (128, [10, 20]), (192, [10, 20, 30])):
        case = _one_channel_case(device, dtype, 60, topk=topk)
        _check_one_channel(case, levels, [1.0], [found], refined=refined)


# ---- A single query with its keys ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("group", [1, 4, 12])
@pytest.mark.parametrize(
    "kv_len, window, anchors",
    [(100 * 64, 70, 5), (90 * 64 + 13, 0, 0), (130 * 64 + 63, 700, 130), (75 * 64 + 1, 1, 64)],
)
def test_a_single_query_is_refined_by_its_keys(
    device, seed, dtype, causal, group, kv_len, window, anchors
):
    """Keys of their own lengths in every block, so that few short units tell what it holds."""
    case = Case(
        device, seed, dtype, batch=2, kv_heads=2, group=group, query_len=1, kv_len=kv_len,
        head_dim=32, window=window, anchors=anchors, topk=9 * 64, causal=causal, scale=0.5,
        selector="block",
    )  # fmt: skip
    query, key, _ = case.tensors()
    key[:, :, ::37] *= 2.0
    scores, lists = _lists(case, query, key)
    chosen = selection.check_lists(scores, *lists, case.budget)
    _check_estimate(case, scores, chosen, key)
    by_units, lists = _lists(case, query, key, refined=False)
    assert not torch.equal(chosen, selection.check_lists(by_units, *lists, case.budget))


@pytest.mark.parametrize("query_len", [1, 2, 70])
@pytest.mark.parametrize("selector", SELECTORS)
def test_keys_change_no_other_lists(device, seed, query_len, selector):
    case = Case(
        device, seed, torch.bfloat16, batch=3, kv_heads=4, query_len=query_len, kv_len=5000,
        topk=256, scale=0.5, selector=selector,
    )  # fmt: skip
    query, key, _ = case.tensors()
    (_, with_keys), (_, without) = (_lists(case, query, key, refined=r) for r in (True, False))
    refined = selector == "block" and query_len == 1
    assert all(map(torch.equal, with_keys, without)) != refined


# ---- Budgets ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "selector, refined", [("block", False), ("block", True), ("mean", False), ("quest", False)]
)
def test_top_p_takes_the_fewest_heaviest_blocks(device, dtype, selector, refined):
    """Four blocks of mass 0.147 and 56 of 0.0073; for quest, whose masses are those of a block's
    hottest of four units, a quarter of that."""
    levels = torch.zeros(60, 64)
    hot = [5, 20, 40, 50]
    levels[hot] = 3.0
    lists = {0.1: [], 0.5: hot[:1], 0.6: hot[:2], 0.8: hot[:3], 0.9: hot, 0.97: [0, 1, *hot]}
    if selector == "quest":
        lists = {0.5: [], 0.9: hot[:2], 0.95: hot[:3], 0.98: hot, 0.99: [0, *hot]}
    lists[1.0] = [0, 1, 2, 3, 4, 5, 6, 20, 40, 50]
    for top_p, found in lists.items():
        case = _one_channel_case(device, dtype, 60, topk=640, top_p=top_p, selector=selector)
        _check_one_channel(case, levels, [1.0], [found], refined=refined)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selector, refined", [("block", False), ("block", True), ("mean", False)])
def test_the_whole_mass_leaves_out_blocks_without_any(device, dtype, selector, refined):
    levels = torch.full((12, 64), -torch.inf)
    levels[[0, 2, 3, 5, 11]] = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0])[:, None]
    for blocks, found in ((8, [0, 2, 3, 5, 11]), (12, list(range(12)))):  # 12: all fit
        case = _one_channel_case(device, dtype, 12, topk=64 * blocks, top_p=1.0, selector=selector)
        _check_one_channel(case, levels, [1.0], [found], refined=refined)


@pytest.mark.parametrize(
    "selector, query_len, kv_len",
    [*itertools.product(SELECTORS, (1, 70), (5000,)), ("block", 70, 2**18 + 100)],
)
def test_lists_grow_with_top_p(device, seed, selector, query_len, kv_len):
    case = Case(
        device, seed, DTYPES[seed % 3], group=2, query_len=query_len, kv_len=kv_len,
        head_dim=16, topk=9 * 64, scale=1.0, selector=selector,
    )  # fmt: skip
    query, key, _ = case.tensors()
    smaller = torch.zeros((), dtype=torch.bool, device=device)
    for top_p in (0.05, 0.4, 0.7, 0.9, 0.97, 0.99, 0.999, 1.0, None):
        shortened = replace(case, top_p=top_p)
        scores, lists = _lists(shortened, query, key)
        chosen = selection.check_lists(scores, *lists, shortened.budget)
        assert not (smaller & ~chosen).any(), "a larger share of the mass lists fewer blocks"
        assert top_p is not None or torch.equal(smaller, chosen), "1 leaves out blocks with mass"
        _check_estimate(shortened, scores, chosen, key)
        smaller = chosen


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("query_len", [1, 68])
@pytest.mark.parametrize("top_p", [None, 0.5, 0.9])
def test_every_head_has_its_own_budget(device, seed, selector, query_len, top_p):
    case = Case(
        device, seed, DTYPES[seed % 3], batch=2, kv_heads=6, group=2, query_len=query_len,
        kv_len=6000, head_dim=16, topk=256, topk_per_head=(-(2**31), 0, 63, 130, 256, 2**31 - 1),
        top_p=top_p, scale=2.0**-3, selector=selector, content="integers",
    )  # fmt: skip
    query, key, _ = case.tensors()
    scores, chosen, certain = _check_exact_lists(case, query, key)
    assert certain.float().mean() > 0.5
    assert chosen.sum(-1).amax((0, 2)).tolist() == [0, 0, 0, 2, 4, 4] or top_p
    _check_estimate(case, scores, chosen, key)


def test_a_budget_of_a_head_is_the_budget_of_a_call(device, seed):
    case = Case(
        device, seed, torch.float16, kv_heads=3, group=2, query_len=70, kv_len=5000, topk=256,
        topk_per_head=(64, 128, 192), selector="block",
    )  # fmt: skip
    query, key, _ = case.tensors()
    _, (indices, counts) = _lists(case, query, key)
    for head, blocks in enumerate((1, 2, 3)):
        alone = replace(case, topk=blocks * 64, topk_per_head=None)
        _, (expected, _) = _lists(alone, query, key)
        assert torch.equal(indices[:, head, :, :blocks], expected[:, head])
        assert (counts[:, head] == blocks).all()


def test_budgets_of_heads_hold_where_attention_would_be_dense(device):
    """A budget of all keys, but not for the first head."""
    case = Case(
        device, dtype=torch.float16, kv_heads=2, query_len=1, kv_len=1500, topk=1536,
        topk_per_head=(0, 1536), selector="block",
    )  # fmt: skip
    args = {**case.selection_args, **case.attention_args}
    estimate = ops.attention_forward(*case.tensors(), **args)[2]
    assert estimate[0, 0, 0] > 0.5 and estimate[0, 1, 0] == 0


# ---- What is not finite ----


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("blocks, causal", [(30, True), (100, True), (100, False)])
def test_keys_that_are_not_finite(device, seed, selector, bad, blocks, causal):
    """A query that sees a score of NaN or +inf has no masses; the others rank as ever."""
    for query_len, at in ((1, 20), (1, blocks - 20), (33, 20), (64, blocks - 1), (64, 2)):
        case = Case(
            device, seed, torch.float32, query_len=query_len, kv_len=blocks * 64, head_dim=16,
            window=20, anchors=8, topk=4 * 64, causal=causal, scale=2.0**-3, selector=selector,
            content="integers",
        )  # fmt: skip
        query, key, value = case.tensors()
        key[:, :, at * 64 + 37] = bad
        for refined in (False, True):
            _check_exact_lists(case, query, key, refined=refined)
        estimate = ops.attention_forward(
            query, key, value, **case.selection_args, **case.attention_args
        )[2]
        assert ((estimate >= 0) & (estimate <= 1)).all()


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("refined", [False, True])
def test_a_lone_query_that_sees_a_nan_lists_the_lowest_blocks(device, selector, refined):
    case = Case(
        device, dtype=torch.float32, query_len=1, kv_len=1024, anchors=70, topk=256,
        selector=selector,
    )  # fmt: skip
    query, key, _ = case.tensors()
    key[:, :, 9 * 64 + 9] = torch.nan
    _, (indices, counts) = _lists(case, query, key, refined=refined)
    assert indices.flatten().tolist() == [1, 2, 3, 4] and counts.item() == 4
    _, (_, counts) = _lists(replace(case, top_p=1.0), query, key, refined=refined)
    assert counts.item() == 0, "without masses nothing is left out"
