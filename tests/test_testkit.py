"""The instruments themselves: hand-made values, sound ops pass, faulty ones do not."""

from __future__ import annotations

import math

import pytest
import torch

from tests.testkit import cases, checks, definition, far_field, naive, oracle, poison, selection

# Each fault is looked for in so many random cases; most are found in the first few.
CASES_PER_FAULT = 160


@pytest.fixture
def use_ops(monkeypatch: pytest.MonkeyPatch):
    return lambda fault="": monkeypatch.setattr(checks, "ops", naive.NaiveOps(fault))


def test_supports_of_a_written_out_example():
    ranges = definition.Ranges(query_len=3, kv_len=5, window=2, anchors=1, causal=True)
    assert ranges.always().int().tolist() == [[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 1, 1]]
    assert ranges.candidates().int().tolist() == [[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0]]
    both_sides = definition.Ranges(query_len=1, kv_len=3, window=2, anchors=0, causal=False)
    assert both_sides.always().int().tolist() == [[0, 1, 1]]
    before_all_keys = definition.Ranges(query_len=3, kv_len=1, window=9, anchors=9, causal=True)
    assert before_all_keys.always().int().tolist() == [[0], [0], [1]]


def test_tiles_are_the_documented_ones():
    assert [definition.tile_positions(g) for g in (1, 2, 3, 4, 8, 64)] == [64, 64, 32, 32, 16, 2]
    assert [definition.pool_size(g) for g in (1, 8, 16, 17, 33, 64)] == [8, 8, 8, 4, 2, 2]


def test_list_entries_that_fall_or_leave_the_range_are_skipped():
    indices = torch.tensor([[[[2, 1, 2, 9, -1, 3]]]], dtype=torch.int32)
    listed, invalid = definition.listed_blocks(indices, torch.tensor([[[6]]]), 5 * 64)
    assert listed[0, 0, 0].int().tolist() == [0, 0, 1, 1, 0] and invalid
    listed, invalid = definition.listed_blocks(indices, torch.tensor([[[1]]]), 5 * 64)
    assert listed[0, 0, 0].int().tolist() == [0, 0, 1, 0, 0] and not invalid
    _, invalid = definition.listed_blocks(indices, torch.tensor([[[-1]]]), 5 * 64)
    assert invalid


def test_sampled_blocks_are_at_most_eight_of_a_list():
    ranges = definition.Ranges(query_len=4, kv_len=40 * 64 - 9, window=0, anchors=0, causal=False)
    for count, places in {
        0: [], 1: [0], 7: [*range(7)], 8: [*range(8)], 9: [0, 2, 4, 6, 8], 16: [*range(0, 16, 2)],
        17: [0, 3, 6, 9, 12, 15],
    }.items():  # fmt: skip
        blocks = 3 + 2 * torch.arange(count)
        listed = torch.zeros(1, 1, 1, 40, dtype=torch.bool)
        listed[..., blocks] = True
        sampled = far_field.sampled_blocks(ranges, listed, 1)
        assert sampled[0, 0, 0].nonzero().flatten().tolist() == [3 + 2 * n for n in places]
        # The last block holds 55 keys.
        listed[..., -1] = True
        assert not far_field.sampled_blocks(ranges, listed, 1)[..., -1].any()


def test_blocks_that_some_row_does_not_see_in_full_take_a_place_and_are_not_sampled():
    ranges = definition.Ranges(query_len=4, kv_len=40 * 64, window=0, anchors=0, causal=True)
    listed = torch.zeros(1, 1, 1, 40, dtype=torch.bool)
    listed[..., [2, 5, 39]] = True
    assert far_field.sampled_blocks(ranges, listed, 1).nonzero()[:, -1].tolist() == [2, 5]


def test_estimate_of_a_row_done_by_hand():
    """One walked block of 62 keys at score 0 and 2 at log 32, one pool of 64 at log 2."""
    query = torch.zeros(1, 1, 2, 8)
    query[..., 0] = 1.0
    key = torch.zeros(1, 1, 128, 8)
    key[:, :, :2, 0] = math.log(32)
    key[:, :, 64:, 0] = math.log(2)
    ranges = definition.Ranges(query_len=2, kv_len=128, window=0, anchors=0, causal=False)
    listed = torch.tensor([True, False]).view(1, 1, 1, 2)
    means = key.unflatten(2, (2, 64)).mean(3)
    found = far_field.estimated_omission(
        query, key, far_field.divide(ranges, listed, 1), means,
        far_field.sampled_blocks(ranges, listed, 1), scale=1.0,
    )  # fmt: skip
    kept, pools = 62 + 2 * 32, 64 * 2
    raised = pools * (kept / 64) / 32 ** (2 / 64)  # by the gap of the walked block
    for share in found.share.flatten().tolist():
        assert share == pytest.approx(raised / (raised + kept), rel=1e-6)
    assert (found.least < found.share).all() and (found.share < found.most).all()
    assert (found.most - found.least).max() < 1e-3


def test_oracle_on_a_softmax_done_by_hand():
    query = torch.tensor([[[[2.0]]]]).expand(1, 1, 1, 8) / 8
    key = torch.tensor([0.0, math.log(3), 99.0]).view(1, 1, 3, 1).expand(1, 1, 3, 8) / 2
    value = torch.tensor([1.0, 5.0, 7.0]).view(1, 1, 3, 1).expand(1, 1, 3, 8)
    support = torch.tensor([True, True, False])
    result = oracle.attention(query, key, value, support, scale=1.0)
    assert result.out.flatten().tolist() == pytest.approx([4.0] * 8)
    assert result.lse.item() == pytest.approx(math.log(4))
    empty = oracle.attention(query, key, value, torch.tensor([False] * 3), scale=1.0)
    assert empty.out.abs().max() == 0 and empty.lse.item() == -math.inf


def test_top_k_oracles_break_ties_downwards():
    score = torch.tensor([[1.0, 3.0, 1.0, math.nan, 3.0, 1.0]])
    chosen = selection.expected_tokens(score, torch.ones(1, 6, dtype=torch.bool), 3)
    assert chosen.int().tolist() == [[1, 1, 0, 0, 1, 0]]
    mass = torch.tensor([[0.1, 0.3, 0.3, 0.1, 0.2]])
    eligible, three = torch.tensor([[1, 1, 1, 1, 0]]).bool(), torch.tensor([3])
    blocks, certain = selection.expected_lists(mass, eligible, three)
    assert blocks.int().tolist() == [[1, 1, 1, 0, 0]] and certain.all()


def test_shortened_lists_leave_out_as_much_as_they_may():
    mass = torch.tensor([[0.2, 0.3, 0.2, 0.1, 0.2, 0.0]], dtype=torch.float64)
    eligible, four = torch.tensor([[1, 1, 1, 1, 0, 1]]).bool(), torch.tensor([4])
    for top_p, expected in ((0.95, 4), (0.85, 3), (0.72, 3), (0.65, 2), (0.45, 1), (0.15, 0)):
        blocks, certain = selection.expected_lists(mass, eligible, four, top_p)
        order = [1, 0, 2, 3][:expected]
        assert blocks[0].nonzero().flatten().tolist() == sorted(order) and certain.all()
    assert not selection.expected_lists(mass, eligible, four, 0.9)[1].any(), "0.1 may be 1 - 0.9"
    fits = selection.expected_lists(mass, eligible, four + 1, 0.15)[0]
    assert torch.equal(fits, eligible), "nothing is cut where all blocks fit"


def test_margins_of_every_layout_are_nan():
    tensor = torch.randn(2, 3, 5, 8)
    for layout in poison.LAYOUTS:
        view = poison.embed(tensor, layout)
        assert view.stride(-1) == 1 and not view.isnan().any()
        if layout != "head_shared":
            assert torch.equal(view, tensor)
            whole = torch.empty(0).set_(view.untyped_storage())
            assert whole.isnan().sum() == whole.numel() - tensor.numel() > 0
    assert poison.embed(tensor, "misaligned").data_ptr() % 16 == 4


def test_same_seed_same_case():
    first, again = cases.from_seed(7, "cpu"), cases.from_seed(7, "cpu")
    assert first == again != cases.from_seed(8, "cpu")
    for a, b in zip(first.tensors(), again.tensors(), strict=True):
        assert torch.equal(a, b)


def test_sound_ops_pass(use_ops, seed):
    use_ops()
    outcomes = [checks.check_case(cases.from_seed(seed + n, "cpu")) for n in range(24)]
    assert sum(outcome.probes for outcome in outcomes) > 10_000
    assert 0 < max(outcome.bound_used for outcome in outcomes) < 1


@pytest.mark.parametrize("fault", naive.FAULTS)
def test_every_planted_fault_is_found(use_ops, seed, fault):
    use_ops(fault)
    for n in range(CASES_PER_FAULT):
        try:
            checks.check_case(cases.from_seed(seed + n, "cpu"))
        except AssertionError:
            return
    pytest.fail(f"{fault} lived through {CASES_PER_FAULT} random cases from seed {seed}")
