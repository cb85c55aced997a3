"""Generation whose drafts a dense pass verifies."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from condensate_ext.transformers import Lossless, lossless  # noqa: E402

from tests.testkit import tiny_lm  # noqa: E402

# Budgets that leave something out of 400 tokens: drafts differ from what the dense pass wants.
ROUGH = {"window": 16, "anchors": 8, "topk": 64, "shortlist": 64, "far_field": False}
OPTIONS = {
    "max_new_tokens": 24, "min_new_tokens": 24, "pad_token_id": 0,
    "attention_mask": torch.ones(1, 400, dtype=torch.long),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_lm.make_model()


@pytest.fixture
def ids():
    return torch.randint(97, (1, 400), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("draft_tokens", [1, 4, 15])
@pytest.mark.parametrize("seed", range(2))
def test_greedy_tokens_are_the_dense_models(model, draft_tokens, seed):
    ids = torch.randint(97, (1, 400), generator=torch.Generator().manual_seed(seed))
    dense = model.generate(ids, do_sample=False, **OPTIONS)
    decoding = Lossless(draft_tokens, **ROUGH)
    ours = model.generate(ids, custom_generate=decoding, do_sample=False, **OPTIONS)
    assert torch.equal(ours, dense)
    counts = decoding.acceptance
    assert 0 < counts.accepted < counts.drafted, "some drafts have to fail, or nothing was tried"
    assert counts.accepted + counts.rounds + 1 == 24


def test_drafts_of_a_covering_budget_are_all_accepted(model, ids):
    decoding = Lossless(4, topk=640)
    model.generate(ids, custom_generate=decoding, do_sample=False, **OPTIONS)
    assert decoding.acceptance.accepted == decoding.acceptance.drafted
    assert decoding.acceptance.mean_accepted > 3


def test_the_cache_holds_what_dense_passes_wrote(model, ids):
    cache = transformers.DynamicCache(config=model.config)
    ours = model.generate(
        ids, custom_generate=Lossless(4, **ROUGH), do_sample=False, past_key_values=cache, **OPTIONS
    )
    fresh = model(input_ids=ours[:, :-1], use_cache=True).cache
    held = cache.get_seq_length()
    assert held == ours.shape[1] - 1
    for layer, expected in zip(cache.layers, fresh.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.values, expected.values, atol=1e-4, rtol=1e-4)


def test_stops_where_dense_decoding_stops(model, ids):
    options = {**OPTIONS, "min_new_tokens": None, "do_sample": False, "eos_token_id": 500}
    stop = int(model.generate(ids, **options)[0, 400 + 12])
    options["eos_token_id"] = stop
    expected = model.generate(ids, **options)
    assert expected.shape[1] < 424
    ours = model.generate(ids, custom_generate=Lossless(6, **ROUGH), **options)
    assert torch.equal(ours, expected)


def test_a_draft_is_accepted_so_that_tokens_have_the_dense_distribution():
    """The rule alone, against its definition: 200,000 draws from p through proposals of q."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.rand(1, 6, generator=generator).log() for _ in range(2))
    q[0, 2] = -torch.inf
    torch.manual_seed(1)
    draw = lossless._Draw(lambda _, scores: scores, sample=True)
    share = p.softmax(-1)
    counts = torch.zeros(6)
    draws = 20_000
    for _ in range(draws):
        draft = draw.token(None, q)
        token, _ = draw.decide(None, p, draft)
        counts[token] += 1
    error = (share * (1 - share) / draws).sqrt()
    assert ((counts / draws - share).abs() < 4.5 * error).all()


def test_sampling_with_a_covering_budget_accepts_everything(model, ids):
    torch.manual_seed(5)
    decoding = Lossless(4, topk=640)
    model.generate(ids, custom_generate=decoding, do_sample=True, temperature=0.8, **OPTIONS)
    assert decoding.acceptance.accepted == decoding.acceptance.drafted


def test_what_it_cannot_do_is_said(model, ids):
    with pytest.raises(ValueError, match="draft_tokens is 16"):
        Lossless(16)
    with pytest.raises(TypeError, match="unknown"):
        Lossless(budget=3)
    with pytest.raises(ValueError, match="one row without padding"):
        model.generate(ids.expand(2, -1), custom_generate=Lossless(), max_new_tokens=4)
    with pytest.raises(ValueError, match="tokens alone"):
        model.generate(
            ids, custom_generate=Lossless(), return_dict_in_generate=True, **OPTIONS
        )
    twin = copy.deepcopy(model)
    assert twin.config._attn_implementation == "sdpa"
