"""The far field: what is condensed, into which pools, what it must not see, what it costs."""

from __future__ import annotations

import condensate_ext
import condensate_ext as ops
import pytest
import torch
from torch import Tensor

from tests.test_paths import path_of, runs_on
from tests.testkit import far_field, oracle, selection
from tests.testkit.cases import Case
from tests.testkit.checks import check_case
from tests.testkit.definition import (
    COARSE,
    DTYPES,
    ceil_div,
    listed_blocks,
    support_of_lists,
    tile_positions,
)

BLOCK_SELECTORS = ("block", "quest", "mean")
EDGES = [(63, 129), (64, 128), (65, 127), (127, 193), (129, 191), (64, 1), (300, 130), (1, 640)]
# Blocks around which the pools change their size, also with a last pool that the tile cuts.
POOL_BORDERS = {128: 1, 129: 2, 130: 2, 256: 2, 257: 4, 260: 4}


def _one_list(case: Case, *blocks: int) -> tuple[Tensor, Tensor]:
    """The same list for every tile."""
    tiles = ceil_div(case.query_len, tile_positions(case.group))
    lead = (case.batch, case.kv_heads, tiles)
    indices = torch.tensor(blocks, dtype=torch.int32, device=case.device)
    counts = torch.full(lead, len(blocks), dtype=torch.int32, device=case.device)
    return indices.expand(*lead, -1).contiguous(), counts


def _attend(case: Case, tensors: tuple[Tensor, ...], lists: tuple[Tensor, Tensor]):
    return ops.block_sparse_attention(*tensors, *lists, **case.attention_args)


# ---- The definition ----


@pytest.mark.parametrize("choice", [0, 1, 2])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_edges_on_every_path(device, seed, monkeypatch, choice, group, head_dim):
    path = path_of(device, choice)
    monkeypatch.setenv("CONDENSATE_FORCE_PATH", path)
    checked = 0
    for index, (query_len, kv_len) in enumerate(EDGES):
        few = index % 2
        case = Case(
            device, seed + index, (torch.bfloat16, torch.float16)[few], batch=1 + few,
            kv_heads=2 - few, group=group, query_len=query_len, kv_len=kv_len, head_dim=head_dim,
            window=(0, 20, 64, 65)[index % 4], anchors=(3, 0, 64, 67)[index % 4],
            causal=index % 3 > 0, layouts=("transposed", "padded", "contiguous"), far_field=True,
            selector="hostile" if index % 4 == 3 else "lists", topk=2 * 64,
        )  # fmt: skip
        if runs_on(case, path):
            assert check_case(case).probes > 0
            checked += 1
    assert checked >= len(EDGES) - 2


@pytest.mark.parametrize("choice", [0, 1, 2])
@pytest.mark.parametrize("blocks", POOL_BORDERS)
@pytest.mark.parametrize("short", [0, 1])
def test_pool_borders_on_every_path(device, seed, monkeypatch, choice, blocks, short):
    """Pools of one, two and four blocks, also cut by the tile and by the end of the keys."""
    path = path_of(device, choice)
    monkeypatch.setenv("CONDENSATE_FORCE_PATH", path)
    assert far_field.pool_blocks(blocks * 64 - short) == POOL_BORDERS[blocks]
    for group, dtype, causal in ((4, torch.bfloat16, True), (8, torch.float16, False)):
        case = Case(
            device, seed, dtype, group=group, query_len=tile_positions(group) + 2,
            kv_len=blocks * 64 - short, window=20, anchors=65, topk=8 * 64, causal=causal,
            far_field=True,
        )  # fmt: skip
        assert runs_on(case, path)
        assert check_case(case).probes > 0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 64, 65])
@pytest.mark.parametrize("anchors", [0, 1, 64, 65])
def test_window_and_anchor_edges(device, window, anchors, causal):
    """Also without window and anchors, where the blocks of the tile itself may be lost: nothing
    condenses a block that some row of the tile does not see in full."""
    # The last one's tile begins on the last key of a block.
    for query_len, kv_len in ((130, 200), (200, 130), (70, 133)):
        check_case(
            Case(
                device, dtype=torch.float16, group=2, query_len=query_len, kv_len=kv_len,
                window=window, anchors=anchors, causal=causal, far_field=True,
            )
        )  # fmt: skip


@pytest.mark.parametrize("group", [1, 2, 3, 5, 12, 33, 64])
def test_group_sizes(device, group):
    for dtype in DTYPES:
        check_case(Case(device, dtype=dtype, group=group, query_len=67, kv_len=260, far_field=True))


@pytest.mark.parametrize("query_len, kv_len", [(0, 0), (0, 70), (70, 0), (1, 1), (70, 1), (1, 65)])
def test_any_lengths(device, query_len, kv_len):
    for causal in (True, False):
        for selector in ("lists", *BLOCK_SELECTORS):
            check_case(
                Case(
                    device, kv_heads=2, group=3, query_len=query_len, kv_len=kv_len, window=0,
                    anchors=0, topk=0, selector=selector, causal=causal, batch=2, far_field=True,
                )
            )  # fmt: skip


@pytest.mark.parametrize("head_dim", [8, 40, 72, 200, 256])
@pytest.mark.parametrize("selector", ["lists", *BLOCK_SELECTORS])
def test_head_dims_and_selectors(device, selector, head_dim):
    for dtype in DTYPES:
        check_case(
            Case(
                device, dtype=dtype, head_dim=head_dim, group=2, query_len=70, kv_len=900,
                selector=selector, far_field=True, layouts=("padded",) * 3,
            )
        )  # fmt: skip


# ---- What it must equal ----


@pytest.mark.parametrize("selector", BLOCK_SELECTORS)
@pytest.mark.parametrize("causal", [True, False])
def test_a_budget_over_the_context_is_dense_attention(device, selector, causal):
    case = Case(
        device, dtype=torch.float16, group=2, query_len=150, kv_len=300, topk=320, causal=causal,
        selector=selector,
    )  # fmt: skip
    calls = [
        ops.attention_forward(
            *case.tensors(), topk=320, selector=selector, **case.range_args, far_field=f
        )
        for f in (False, True, None)
    ]
    for call in calls[1:]:
        assert all(map(torch.equal, call, calls[0]))


def test_lists_of_every_block_are_dense_attention(device):
    """Nothing is left to condense, and what is walked is walked whole."""
    case = Case(
        device, dtype=torch.bfloat16, group=4, query_len=100, kv_len=640, anchors=3, window=5,
        far_field=True,
    )  # fmt: skip
    tensors = case.tensors()
    out, lse = _attend(case, tensors, _one_list(case, *range(10)))
    oracle.assert_matches(oracle.attention(*tensors, case.ranges.visible()), out, lse)


def test_equal_keys_and_values_of_a_block_are_condensed_without_loss(device):
    case = Case(
        device, dtype=torch.float16, group=2, query_len=70, kv_len=140 * 64, window=64, anchors=9,
        far_field=True,
    )  # fmt: skip
    query, key, value = (t.contiguous() for t in case.tensors())
    # Pools hold two blocks, so pairs of blocks are equal throughout.
    key, value = (t[:, :, ::128].repeat_interleave(128, 2) for t in (key, value))
    out, lse = _attend(case, (query, key, value), _one_list(case))
    oracle.assert_matches(oracle.attention(query, key, value, case.ranges.visible()), out, lse)


@pytest.mark.parametrize("selector", BLOCK_SELECTORS)
def test_attention_is_its_stages_one_after_another(device, selector):
    case = Case(
        device, dtype=torch.float16, group=4, query_len=90, kv_len=900, selector=selector,
        far_field=True,
    )  # fmt: skip
    query, key, value = case.tensors()
    summaries = ops.block_summaries(key, selector=selector)
    lists = ops.select_blocks(
        query, summaries, kv_len=900, topk=64, selector=selector, **case.attention_args
    )
    staged = _attend(case, (query, key, value), lists)
    whole = ops.attention_forward(
        query, key, value, topk=64, selector=selector, **case.attention_args
    )
    means = ops.block_summaries(key, selector="mean")
    coarse = selection.level_of(summaries, selector, COARSE) if selector == "block" else means
    if torch.equal(coarse, means):  # both are rounded means, which need not be added up alike
        assert all(map(torch.equal, staged, whole[:2]))
    else:
        torch.testing.assert_close(staged[0], whole[0], atol=2e-3, rtol=2e-3)
    assert torch.equal(ops.attention(
        query, key, value, topk=64, selector=selector, **case.range_args), whole[0],
    )  # fmt: skip


@pytest.mark.parametrize("selector", (*BLOCK_SELECTORS, "exact"))
def test_on_by_default_where_the_selector_lists_blocks(device, selector):
    case = Case(device, query_len=70, kv_len=900, selector=selector)
    args = {**case.range_args, "topk": 64, "selector": selector}
    on = selector != "exact"
    out = ops.attention(*case.tensors(), **args)
    assert condensate_ext.last_plan().far_pools == (15 if on else 0)
    assert torch.equal(out, ops.attention(*case.tensors(), **args, far_field=on))
    if on:
        assert not torch.equal(out, ops.attention(*case.tensors(), **args, far_field=False))


def test_runs_repeat_to_the_bit_and_do_not_see_their_batch(device, seed):
    for dtype in DTYPES:
        case = Case(
            device, seed, dtype, batch=3, kv_heads=2, group=4, query_len=90, kv_len=9000, topk=256,
            far_field=True,
        )  # fmt: skip
        tensors, lists = case.tensors(), case.lists()
        first = _attend(case, tensors, lists)
        assert all(map(torch.equal, first, _attend(case, tensors, lists)))
        alone = _attend(
            case,
            (tensors[0][1:2, 4:], tensors[1][1:2, 1:], tensors[2][1:2, 1:]),
            tuple(t[1:2, 1:].contiguous() for t in lists),  # type: ignore[arg-type]
        )
        assert all(map(torch.equal, (t[1:2, 4:] for t in first), alone))


# ---- What it may and may not see ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.01, None, 1.0])
def test_the_log_sum_exp_never_exceeds_that_of_all_keys(device, seed, dtype, scale):
    case = Case(
        device, seed, dtype, group=2, query_len=90, kv_len=9000, scale=scale, far_field=True
    )
    query, key, value = case.tensors()
    lists = case.lists()
    _, lse = _attend(case, (query, key, value), lists)
    listed, _ = listed_blocks(*lists, case.kv_len)
    division = far_field.divide(case.ranges, listed, case.query_heads)
    means = [ops.block_summaries(t, selector="mean") for t in (key, value)]
    bound = far_field.attention(query, key, value, division, (means[0], means[1]), scale).lse_bound
    full = oracle.attention(query, key, value, case.ranges.visible(), scale)
    # The means themselves are rounded once more.
    size = oracle.scores(query.abs(), key.abs(), case.scale).amax(-1)
    rounded = oracle.UNIT_ROUNDOFF[dtype] * size
    assert (lse.double() <= full.lse + full.lse_bound + bound + rounded).all()
    near = support_of_lists(case.ranges, listed, case.query_heads)
    assert (lse.double() >= oracle.attention(query, key, value, near, scale).lse - bound).all()


@pytest.mark.parametrize("choice", [0, 1, 2])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1000.0])
@pytest.mark.parametrize("at", [8000, 8192, 8200])
def test_earlier_rows_do_not_see_later_keys(device, monkeypatch, choice, bad, at):
    """Not by rounding either: pools of two blocks are cut where a tile no longer sees them. Keys
    are later than their row; values, which a weight of 0 does not silence, than its tile."""
    path = path_of(device, choice)
    monkeypatch.setenv("CONDENSATE_FORCE_PATH", path)
    case = Case(
        device, dtype=torch.float16, group=2, query_len=600, kv_len=8400, window=40, anchors=70,
        topk=128, far_field=True,
    )  # fmt: skip
    query, key, value = case.tensors()
    lists = case.lists()
    before = _attend(case, (query, key, value), lists)
    key[:, :, at:] = bad
    value[:, :, ceil_div(at, 64) * 64 :] = bad
    after = _attend(case, (query, key, value), lists)
    seen = at - (case.kv_len - case.query_len)
    value_tile = (ceil_div(at, 64) * 64 - (case.kv_len - case.query_len)) // 64 * 64
    untouched = min(seen, value_tile)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :, :untouched], b[:, :, :untouched])
        assert not torch.equal(a[:, :, seen:], b[:, :, seen:])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1000.0])
@pytest.mark.parametrize("selector", BLOCK_SELECTORS)
def test_earlier_tiles_do_not_see_later_keys_through_their_lists(device, selector, bad):
    case = Case(
        device, dtype=torch.bfloat16, query_len=640, kv_len=8960, topk=128, selector=selector,
        far_field=True,
    )  # fmt: skip
    tensors = case.tensors()

    def attend() -> Tensor:
        out: Tensor = ops.attention(*tensors, topk=128, selector=selector, **case.attention_args)
        return out

    before = attend()
    for tensor in tensors[1:]:
        tensor[:, :, 8640:] = bad
    after = attend()
    assert torch.equal(before[:, :, :320], after[:, :, :320])
    assert not torch.equal(before[:, :, 320:], after[:, :, 320:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_key_or_value_counts_where_it_is_attended_or_condensed(device, dtype, bad):
    case = Case(
        device, dtype=dtype, group=2, query_len=200, kv_len=8500, window=10, anchors=0,
        far_field=True,
    )  # fmt: skip
    for tensor, at in ((1, 8450), (1, 700), (2, 8450), (2, 700)):
        tensors = case.tensors()
        tensors[tensor][:, :, at, 3] = bad
        lists = _one_list(case, 4)
        out, lse = _attend(case, tensors, lists)
        listed, _ = listed_blocks(*lists, case.kv_len)
        division = far_field.divide(case.ranges, listed, case.query_heads)
        means = [ops.block_summaries(t, selector="mean") for t in tensors[1:]]
        reference = far_field.attention(*tensors, division, (means[0], means[1]))
        if tensor == 1:
            oracle.assert_matches(reference, out, lse)
            continue
        # A value that a row masks may still spoil it: only what is right must be right.
        finite = out.isfinite()
        assert not (finite & ~reference.finite).any() and finite[..., 4:].all()
        error = (out.double() - reference.out).abs() / reference.out_bound
        assert error[finite].max() <= 1 and lse.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_walked_key_at_minus_infinity_does_not_spoil_its_pool(device, dtype):
    """Attended, it weighs nothing. The sum over its pool is -inf, out of which nothing can be
    taken any more, so that the pool's other block is added up by itself."""
    case = Case(
        device, dtype=dtype, query_len=70, kv_len=8500, window=10, anchors=0, far_field=True
    )
    query, key, value = case.tensors()
    query[..., 3] = query[..., 3].abs() + 0.5
    key[:, :, 5 * 64 + 9, 3] = -torch.inf
    out, lse = _attend(case, (query, key, value), _one_list(case, 5))
    assert out.isfinite().all() and lse.isfinite().all()
    key[:, :, 5 * 64 + 9, 3] = -1e4  # as good as nothing, and finite
    expected, _ = _attend(case, (query, key, value), _one_list(case, 5))
    closeness = 40 * oracle.UNIT_ROUNDOFF[dtype] if dtype != torch.float32 else 1e-3
    assert (out.float() - expected.float()).abs().max() <= closeness


def test_hostile_lists_condense_what_they_do_not_name(device, seed):
    for group in (1, 4):
        case = Case(
            device, seed, torch.float16, batch=2, group=group, query_len=150, kv_len=9000,
            topk=640, selector="hostile", far_field=True,
        )  # fmt: skip
        assert check_case(case).probes > 0


# ---- What it costs ----


@pytest.mark.gpu
def test_memory_stays_a_fifth_of_the_keys_and_values():
    length, key_heads = 131072, 8
    query, key, value = (
        torch.zeros(1, heads, length, 128, dtype=torch.bfloat16, device="cuda")
        for heads in (32, key_heads, key_heads)
    )
    bytes_of_cache = 2 * key.numel() * key.element_size()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = condensate_ext.attention(query, key, value, far_field=True)
    peak = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    assert peak <= 0.2 * bytes_of_cache
