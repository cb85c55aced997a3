"""Wrong or non-finite tensor contents: nothing is read out of bounds, nothing is hidden."""

from __future__ import annotations

import condensate_ext
import condensate_ext as ops
import pytest
import torch
from condensate_ext import ErrorWord

from tests.testkit import oracle
from tests.testkit.cases import Case
from tests.testkit.checks import check_case
from tests.testkit.definition import DTYPES, listed_blocks, support_of_lists
from tests.testkit.error_word import left_set


def _attend(case: Case, indices: torch.Tensor, counts: torch.Tensor):
    return ops.block_sparse_attention(*case.tensors(), indices, counts, **case.attention_args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_garbage_lists_are_skipped_and_reported(device, seed, dtype):
    for group in (1, 4):
        case = Case(
            device, seed, dtype, batch=2, group=group, query_len=150, kv_len=700, topk=640,
            selector="hostile",
        )  # fmt: skip
        condensate_ext.read_error_word(device)
        assert check_case(case).probes > 0
        _attend(case, *case.lists())
        assert condensate_ext.read_error_word(device) & ErrorWord.BLOCK_INDEX
        assert condensate_ext.read_error_word(device) == ErrorWord.NONE, "reading clears the word"


@pytest.mark.parametrize(
    "entries, count, expected",
    [
        ([0, 1, 2, -1], 3, ErrorWord.NONE),
        ([2**31 - 1, -1, -1, -1], 1, ErrorWord.BLOCK_INDEX),
        ([-(2**31), 0, 1, 2], 4, ErrorWord.BLOCK_INDEX),
        ([0, 3, -1, -1], 2, ErrorWord.BLOCK_INDEX),  # one past the last block
        ([0, 0, -1, -1], 2, ErrorWord.BLOCK_INDEX),
        ([2, 1, -1, -1], 2, ErrorWord.BLOCK_INDEX),
        ([0, 1, 2, -1], 5, ErrorWord.BLOCK_INDEX | ErrorWord.BLOCK_COUNT),  # clamped: -1 counts
        ([0, 1, -1, -1], -7, ErrorWord.BLOCK_COUNT),
        ([0, 1, -1, -1], -(2**31), ErrorWord.BLOCK_COUNT),
    ],
)
def test_each_kind_of_bad_list(device, monkeypatch, entries, count, expected):
    case = Case(device, query_len=1, kv_len=160, window=3, anchors=2)
    indices = torch.tensor([[[entries]]], dtype=torch.int32, device=device)
    counts = torch.tensor([[[count]]], dtype=torch.int32, device=device)
    condensate_ext.read_error_word(device)
    out, lse = _attend(case, indices, counts)
    assert condensate_ext.read_error_word(device) == expected
    listed, _ = listed_blocks(indices, counts, case.kv_len)
    support = support_of_lists(case.ranges, listed, 1)
    oracle.assert_matches(oracle.attention(*case.tensors(), support), out, lse)

    monkeypatch.setenv("CONDENSATE_STRICT", "1")
    if expected == ErrorWord.NONE:
        _attend(case, indices, counts)
    else:
        names = {ErrorWord.BLOCK_INDEX: "block_indices", ErrorWord.BLOCK_COUNT: "block_counts"}
        wanted = next(name for bit, name in names.items() if expected & bit)
        with pytest.raises(ValueError, match=f"{wanted}.*skipped; fix them"):
            _attend(case, indices, counts)
        assert condensate_ext.read_error_word(device) == ErrorWord.NONE, "the raise cleared it"


@pytest.mark.parametrize("count, expected", [(0, ErrorWord.NONE), (1, ErrorWord.BLOCK_COUNT),
                                             (-1, ErrorWord.BLOCK_COUNT)])  # fmt: skip
def test_counts_of_lists_without_places(device, monkeypatch, count, expected):
    case = Case(device, query_len=70, kv_len=160)
    indices = torch.empty(1, 1, 2, 0, dtype=torch.int32, device=device)
    counts = torch.full((1, 1, 2), count, dtype=torch.int32, device=device)
    condensate_ext.read_error_word(device)
    out, lse = _attend(case, indices, counts)
    assert condensate_ext.read_error_word(device) == expected
    oracle.assert_matches(oracle.attention(*case.tensors(), case.ranges.always()), out, lse)
    monkeypatch.setenv("CONDENSATE_STRICT", "1")
    if expected == ErrorWord.NONE:
        _attend(case, indices, counts)
    else:
        with pytest.raises(ValueError, match="block_counts has a value outside"):
            _attend(case, indices, counts)
        assert condensate_ext.read_error_word(device) == ErrorWord.NONE, "the raise cleared it"


def test_a_set_word_is_noticed_after_a_test(device):
    """Every test ends with this look at the words."""
    assert left_set() == {}
    indices = torch.full((1, 1, 2, 1), -1, dtype=torch.int32, device=device)
    _attend(Case(device, query_len=70, kv_len=160), indices, torch.ones_like(indices[..., 0]))
    assert left_set() == {device: ErrorWord.BLOCK_INDEX}
    assert left_set() == {}, "looking cleared it"


def test_a_block_past_the_tile_is_valid_and_attends_nothing(device):
    condensate_ext.read_error_word(device)
    case = Case(device, query_len=700, kv_len=640, anchors=0, window=1)
    indices = torch.full((1, 1, 11, 1), 9, dtype=torch.int32, device=device)
    counts = torch.ones(1, 1, 11, dtype=torch.int32, device=device)
    out, lse = _attend(case, indices, counts)
    assert condensate_ext.read_error_word(device) == ErrorWord.NONE
    listed, _ = listed_blocks(indices, counts, 640)
    support = support_of_lists(case.ranges, listed, 1)
    assert int(support[0, 0, -1].sum()) == 64 and int(support[0, 0, 100].sum()) == 1
    oracle.assert_matches(oracle.attention(*case.tensors(), support), out, lse)


def test_budgets_of_heads_are_clamped_and_no_error(device):
    case = Case(
        device, kv_heads=4, query_len=9, kv_len=900, topk=128, selector="block",
        topk_per_head=(-(2**31), -1, 129, 2**31 - 1),
    )  # fmt: skip
    query, key, _ = case.tensors()
    condensate_ext.read_error_word(device)
    _, counts = ops.select_blocks(
        query, ops.block_summaries(key), kv_len=900, **case.selection_args, **case.attention_args
    )
    assert counts.flatten().tolist() == [0, 0, 2, 2]
    assert condensate_ext.read_error_word(device) == ErrorWord.NONE


@pytest.mark.parametrize("row", [-1, 50, 2**40, -(2**62)])
def test_sampled_rows_out_of_range(device, monkeypatch, row):
    case = Case(device, query_len=50, kv_len=90)
    query, key, _ = case.tensors()
    lse = torch.zeros(1, 1, 50, device=device)
    rows = torch.tensor([3, row, 7], device=device)
    condensate_ext.read_error_word(device)
    omitted = ops.omitted_mass(query, key, lse, rows=rows)
    assert condensate_ext.read_error_word(device) == ErrorWord.ROW_INDEX
    whole = ops.omitted_mass(query, key, lse)
    assert torch.equal(omitted[..., [0, 2]], whole[..., [3, 7]])
    monkeypatch.setenv("CONDENSATE_STRICT", "1")
    with pytest.raises(ValueError, match=r"rows has an entry outside 0\.\.query_len-1"):
        ops.omitted_mass(query, key, lse, rows=rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_key_that_is_not_finite_reaches_exactly_its_rows(device, dtype, bad):
    """Scores of NaN or +inf make a row NaN; rows that do not attend the key do not notice it."""
    case = Case(device, dtype=dtype, group=2, query_len=200, kv_len=200, window=10, anchors=0)
    query, key, value = case.tensors()
    key[:, :, 77, 3] = bad
    indices = torch.full((1, 1, 4, 1), -1, dtype=torch.int32, device=device)
    counts = torch.zeros(1, 1, 4, dtype=torch.int32, device=device)
    out, lse = ops.block_sparse_attention(query, key, value, indices, counts, **case.attention_args)
    reference = oracle.attention(query, key, value, case.ranges.always())
    assert not reference.finite.all() and reference.finite[:, :, 87:].all()
    assert torch.equal(out.isfinite(), reference.finite)
    assert torch.equal(lse.isfinite(), reference.finite[..., 0])
    error = (out.double() - reference.out).abs() / reference.out_bound
    assert error[reference.finite].max() <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_stays_in_its_column_and_block(device, dtype, bad):
    """A masked key of a block that is visited for other keys has weight 0, and 0 * NaN is NaN:
    only rows whose tile does not visit the block are sure not to notice."""
    case = Case(device, dtype=dtype, query_len=256, kv_len=256, window=10, anchors=0)
    query, key, value = case.tensors()
    value[:, :, 70, 5] = bad
    indices = torch.full((1, 1, 4, 1), -1, dtype=torch.int32, device=device)
    counts = torch.zeros(1, 1, 4, dtype=torch.int32, device=device)
    out, lse = ops.block_sparse_attention(query, key, value, indices, counts, **case.attention_args)
    reference = oracle.attention(query, key, value, case.ranges.always())
    assert not out[:, :, 70:80, 5].isfinite().any() and lse.isfinite().all()
    assert out[..., :5].isfinite().all() and out[..., 6:].isfinite().all()
    elsewhere = torch.cat([out[:, :, :64], out[:, :, 192:]], 2)
    assert elsewhere.isfinite().all()
    assert (~reference.finite).sum() == 10
    if device == "cpu":  # which leaves masked keys out of such a block's sums
        assert torch.equal(out.isfinite(), reference.finite)
