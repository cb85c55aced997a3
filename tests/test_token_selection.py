"""select_tokens: exact top-k sets where scores are exact, and what the returned pair means."""

from __future__ import annotations

import pytest
import torch
from condensate_ext._token_selection import select_tokens

from tests.testkit import oracle, selection
from tests.testkit.cases import INTEGER_SCALE, Case
from tests.testkit.checks import check_case
from tests.testkit.definition import DTYPES, support_of_pairs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("topk", [0, 1, 2, 63, 64, 500, 5000])
def test_integer_scores_with_many_ties(device, seed, dtype, causal, topk):
    case = Case(
        device, seed, dtype, batch=2, kv_heads=2, group=3, query_len=70, kv_len=1100, head_dim=16,
        topk=topk, causal=causal, scale=INTEGER_SCALE, selector="exact", content="integers",
    )  # fmt: skip
    query, key, _ = case.tensors()
    threshold, tie = select_tokens(query, key, topk=topk, **case.range_args)
    score, candidates = oracle.scores(query, key, case.scale), case.ranges.candidates()
    assert score.unique().numel() < 100, "the scores have to tie for this test to mean something"
    chosen = support_of_pairs(case.ranges, score, threshold, tie) & candidates
    assert torch.equal(chosen, selection.expected_tokens(score, candidates, topk))
    few = (candidates.sum(-1) < topk).expand(threshold.shape)
    assert (threshold[few] == -torch.inf).all() and (tie[few] == 2**31 - 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
def test_attention_takes_exactly_the_selected_keys(device, seed, dtype, head_dim):
    """Attention recomputes the scores; were they not the same to the bit, keys would come or go."""
    for topk in (1, 37, 256):
        outcome = check_case(
            Case(
                device, seed, dtype, kv_heads=2, group=2, query_len=40, kv_len=600,
                head_dim=head_dim, topk=topk, selector="exact",
            )
        )  # fmt: skip
        assert outcome.probes == 4 * 40 * 600


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_scores_are_never_selected(device, dtype):
    case = Case(device, dtype=dtype, query_len=30, kv_len=300, selector="exact")
    query, key, _ = case.tensors()
    key[:, :, 100:110] = torch.nan
    threshold, tie = select_tokens(query, key, topk=20, **case.range_args)
    score = oracle.scores(query, key.nan_to_num(0.0), None)
    score[..., 100:110] = torch.nan
    assert not threshold.isnan().any()
    chosen = support_of_pairs(case.ranges, score, threshold, tie) & case.ranges.candidates()
    # Scores come from float64 here, so the key at the threshold itself may fall either way.
    assert ((chosen.sum(-1) - 20).abs() <= 1).all() and not chosen[..., 100:110].any()
