"""Decode, prefill and continuations of an evaluation, on a small random model."""

import math
import statistics

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from condensate_ext import evaluate  # noqa: E402
from condensate_ext.evaluate import (  # noqa: E402
    control,
    intervals,
    language,
    policies,
    runs,
    survival,
)
from condensate_ext.evaluate.language import Fidelity  # noqa: E402
from condensate_ext.transformers import condensed_attention  # noqa: E402

from tests.testkit import tiny_lm  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

COVERING = policies.covering(640)
SMALL = {"window": 16, "anchors": 8, "topk": 64, "selector": "block", "far_field": False}
EXACT = {**SMALL, "window": 4, "anchors": 2, "topk": 8, "selector": "exact"}
DECODED = 12


@pytest.fixture(scope="module")
def model():
    return tiny_lm.make_model()


@pytest.fixture
def ids():
    return torch.randint(90, (2, 400), generator=torch.Generator().manual_seed(1))


def by_definition(dense, ours, targets):
    """KL, top-1 agreement and both losses of logits [n, vocab], in float64."""
    p, q = dense.double().softmax(-1), ours.double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean().item()
    top1 = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    rows = torch.arange(len(targets))
    return kl, top1, *(-x[rows, targets].log().mean().item() for x in (p, q))


def assert_is(result, expected, tokens):
    assert result.tokens == tokens
    measured = (result.kl, result.top1, result.nll_dense, result.nll)
    assert measured == pytest.approx(expected, rel=1e-3, abs=1e-6)


@torch.no_grad()
def tail_logits(model, ids, prefill_policy, tail_policy):
    """Logits of the last tokens but one in one pass, over a cache; policies are None or given."""
    cache = transformers.DynamicCache(config=model.config)
    for part, policy in (
        (ids[:, : -DECODED - 1], prefill_policy),
        (ids[:, -DECODED - 1 : -1], tail_policy),
    ):
        with runs.attended(model, policy):
            logits = runs.feed(model, part, cache).logits
    return logits


# Decode, prefill and the control.


def test_decode_measures_each_document(model, ids):
    """Selection by tokens is the same for a query alone and in a pass: an independent way."""
    ((first, second),) = evaluate.compare_decode(model, ids, [EXACT], DECODED)
    dense, ours = (tail_logits(model, ids, None, policy) for policy in (None, EXACT))
    for row, result in enumerate((first, second)):
        expected = by_definition(dense[row], ours[row], ids[row, -DECODED:])
        assert expected[0] > 1e-3
        assert_is(result, expected, DECODED)


def test_decode_of_a_batch_is_that_of_its_documents(model, ids):
    together = evaluate.compare_decode(model, ids, [SMALL], DECODED)[0]
    alone = [evaluate.compare_decode(model, row[None], [SMALL], DECODED)[0][0] for row in ids]
    for a, b in zip(together, alone, strict=True):
        # A KL is a difference of logarithms: below 1e-7 float32 logits tell nothing.
        assert a.kl == pytest.approx(b.kl, rel=1e-3, abs=1e-7)
        assert a.nll == pytest.approx(b.nll, rel=1e-3)


@pytest.mark.parametrize("compare", [evaluate.compare_decode, evaluate.compare_cache])
def test_covering_budget_and_control_are_the_dense_model(model, ids, compare):
    shares = []
    short = {**SMALL, "shortlist": 64}  # the default one holds the context
    covered, other, small = compare(
        model, ids, [COVERING, evaluate.CONTROL, short], DECODED, shares.append
    )
    for result in (*covered, *other):
        assert abs(result.kl) < 1e-5
        assert result.top1 == 1
        assert abs(result.dppl_percent) < 0.1
    assert all(result.kl > 1e-4 for result in small)
    assert sum(shares) == pytest.approx(1)


def test_prefill_measures_a_dense_pass_over_the_policys_cache(model, ids):
    ((result, _),) = evaluate.compare_cache(model, ids, [SMALL], DECODED)
    dense, ours = (tail_logits(model, ids, policy, None)[0] for policy in (None, SMALL))
    assert_is(result, by_definition(dense, ours, ids[0, -DECODED:]), DECODED)


def test_whole_text_comparison_counts_every_next_token(model, ids):
    result = evaluate.compare_prefill(model, ids[:1], SMALL)
    with torch.no_grad():
        dense = model(input_ids=ids[:1]).logits[0, :-1]
        with condensed_attention(model, **SMALL):
            ours = model(input_ids=ids[:1]).logits[0, :-1]
    assert_is(result, by_definition(dense, ours, ids[0, 1:]), 399)


def test_text_must_be_longer_than_what_is_decoded(model, ids):
    with pytest.raises(ValueError, match="at least 402"):
        evaluate.compare_decode(model, ids, [SMALL], decode_tokens=400)


def test_summary_of_documents():
    documents = [Fidelity(kl, 1 - kl, 1.0, 1.0 + kl, 10) for kl in (0.1, 0.2, 0.6)]
    found = language.summary(documents)
    assert found["kl"] == pytest.approx(0.3)
    assert found["top1"] == pytest.approx(0.7)
    assert found["dppl_percent"] == pytest.approx(100 * (math.exp(0.3) - 1))
    assert found["dppl_percent_median"] == pytest.approx(100 * (math.exp(0.2) - 1))
    assert found["dppl_percent_worst"] == pytest.approx(100 * (math.exp(0.6) - 1))
    assert (found["documents"], found["tokens"]) == (3, 30)
    # Losses differ by 0.1, 0.2, 0.6: standard error sqrt(0.07 / 3), and 4.303 of them to each side.
    half = 4.3027 * math.sqrt(0.07 / 3)
    bounds = (found["dppl_percent_low"], found["dppl_percent_high"])
    assert bounds == pytest.approx(
        [100 * math.expm1(0.3 - half), 100 * math.expm1(0.3 + half)], rel=1e-4
    )
    assert language.summary(documents[:1])["dppl_percent_low"] is None


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.7062), (2, 4.30265), (7, 2.36462), (30, 2.04227)]
)
def test_intervals_use_students_quantile(degrees, quantile):
    assert intervals.student_quantile(degrees) == pytest.approx(quantile, rel=1e-5)


@pytest.mark.parametrize("scores_held", [1, 7 * 4 * 50, 10**6])
@pytest.mark.parametrize("queries", [1, 50])
def test_unfused_attention_is_causal_attention(monkeypatch, scores_held, queries):
    monkeypatch.setattr(control, "_SCORES", scores_held)
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(3, 4, queries, 16, generator=generator)
    key, value = (torch.randn(3, 2, 50, 16, generator=generator) for _ in range(2))
    out = control.unfused_attention(query, key, value, scale=0.3)
    scores = 0.3 * query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    future = torch.arange(50) > torch.arange(50 - queries, 50)[:, None]
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    torch.testing.assert_close(out, weights @ value.repeat_interleave(2, 1), atol=1e-5, rtol=1e-5)


# Continuations.


def test_greedy_tokens_are_what_transformers_generates(model, ids):
    prompt = ids[:, :300]
    generated = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8,
        do_sample=False, eos_token_id=-1,
    )[:, 300:]  # fmt: skip
    for variant, chunk in ((None, None), (None, 70), (COVERING, None), ("control", 128)):
        tokens = evaluate.greedy_tokens(model, prompt, 8, variant, prefill_chunk=chunk)
        assert torch.equal(tokens, generated)


def test_tokens_before_the_first_difference():
    reference = torch.tensor([[1, 2, 3, 4]] * 4)
    tokens = torch.tensor([[1, 2, 3, 4], [9, 2, 3, 4], [1, 2, 9, 4], [1, 2, 3, 9]])
    assert evaluate.identical_prefix(reference, tokens) == [4, 0, 2, 3]


def test_continuations_are_compared_with_the_dense_one(monkeypatch, ids):
    said = {"dense": [[5, 6, 7], [5, 6, 7]], "block": [[5, 6, 7], [5, 9, 7]]}

    def scripted(model, prompts, new_tokens, variant, *, prefill_chunk, advance):
        assert (prompts.shape[0], new_tokens) == (2, 3)
        return torch.tensor(said[policies.selector_name(variant)])

    monkeypatch.setattr(survival, "greedy_tokens", scripted)
    assert evaluate.compare_continuations(None, ids, [SMALL, None], 3) == [[3, 1], [3, 3]]


def test_continuations_of_a_covering_budget_survive(model, ids):
    covered, other, small = evaluate.compare_continuations(
        model, ids[:, :300], [COVERING, evaluate.CONTROL, SMALL], 16
    )
    assert covered == other == [16, 16]
    assert min(small) < 16


def test_summary_of_continuations():
    assert survival.summary([128, 3, 128, 10], 128) == {
        "identical_tokens": statistics.fmean([128, 3, 128, 10]),
        "identical_tokens_median": 69,
        "survived": 0.5,
        "documents": 4,
        "tokens": 512,
    }


# Policies.


def test_policy_has_what_was_given_and_nothing_else():
    plain = evaluate.policy("block", 1024)
    assert plain == {"window": 256, "anchors": 64, "topk": 704, "selector": "block"}
    assert evaluate.policy("block", 1024, far_field=False, top_p=0.5) == {
        **plain, "far_field": False, "top_p": 0.5,
    }  # fmt: skip
    assert evaluate.keys_per_query(plain) == 1024
    assert evaluate.keys_per_query({"topk": 64}) == 64 + 256 + 64
    assert policies.effective({}, "selector") == "block"


@pytest.mark.parametrize(
    ("selector", "keys", "fix"),
    [("block", 1000, "use 960 or 1024"), ("exact", 319, "at least 320")],
)
def test_policy_refuses_a_budget_and_says_which_to_use(selector, keys, fix):
    with pytest.raises(ValueError, match=rf"{keys} keys .*{fix}"):
        evaluate.policy(selector, keys)
    assert evaluate.policy("exact", 1000)["topk"] == 680
