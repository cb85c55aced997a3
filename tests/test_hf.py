"""The transformers hook and the measures built on it, on a small random model."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from condensate_ext import evaluate  # noqa: E402
from condensate_ext.hf import condensed_attention  # noqa: E402

COVERING = {"topk": 640, "selector": "block"}
SMALL = {"window": 16, "anchors": 8, "topk": 64, "selector": "block"}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def ids():
    return torch.randint(97, (2, 400), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids, policy=None, **kwargs):
    if policy is None:
        return model(input_ids=ids, **kwargs).logits
    with condensed_attention(model, **policy):
        return model(input_ids=ids, **kwargs).logits


def test_covering_budget_gives_the_dense_models_logits(model, ids, device):
    model, ids = copy.deepcopy(model).to(device), ids.to(device)
    torch.testing.assert_close(
        logits(model, ids, COVERING), logits(model, ids), atol=2e-4, rtol=2e-4
    )


@pytest.mark.parametrize("selector", ["block", "quest", "mean", "exact"])
def test_small_budget_changes_late_tokens_and_keeps_those_it_covers(model, ids, selector):
    dense, ours = logits(model, ids), logits(model, ids, {**SMALL, "selector": selector})
    torch.testing.assert_close(ours[:, :24], dense[:, :24], atol=2e-4, rtol=2e-4)
    assert (ours[:, 300:] - dense[:, 300:]).abs().max() > 1e-2


def test_the_far_field_is_on_unless_the_policy_says_otherwise(model, ids):
    on, off = (logits(model, ids, {**SMALL, "far_field": value}) for value in (True, False))
    assert torch.equal(logits(model, ids, SMALL), on) and not torch.equal(on, off)
    with pytest.raises(ValueError, match="far_field is True"):
        logits(model, ids, {**SMALL, "selector": "exact", "far_field": True})


@torch.no_grad()
def test_exact_prefill_does_not_depend_on_how_it_is_cut(model, ids):
    policy = {**SMALL, "selector": "exact"}
    whole = logits(model, ids, policy)
    with condensed_attention(model, **policy):
        first = model(input_ids=ids[:, :250], use_cache=True)
        rest = model(input_ids=ids[:, 250:], past_key_values=first.past_key_values)
    torch.testing.assert_close(
        torch.cat([first.logits, rest.logits], 1), whole, atol=2e-4, rtol=2e-4
    )


def test_greedy_tokens_are_the_dense_models_when_the_budget_covers(model, ids):
    tokens = [
        evaluate.greedy_tokens(model, ids[:1, :300], 8, policy, chunk)
        for policy, chunk in ((None, None), (COVERING, None), (COVERING, 128))
    ]
    assert len(tokens[0]) == 8
    assert tokens[1] == tokens[0]
    assert tokens[2] == tokens[0]


def test_implementation_is_restored_also_after_an_error(model):
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="from inside"), condensed_attention(model):
        raise RuntimeError("from inside")
    assert model.config._attn_implementation == before
    names = transformers.AttentionInterface._global_mapping
    assert not [name for name in names if name.startswith("condensate")]


def test_padding_is_refused(model, ids):
    mask = torch.ones_like(ids)
    logits(model, ids, SMALL, attention_mask=mask)
    mask[0, :3] = 0
    with pytest.raises(NotImplementedError, match=r"padding mask.*equal length"):
        logits(model, ids, SMALL, attention_mask=mask)


def test_explicit_mask_is_refused(model, ids):
    mask = torch.zeros(2, 1, 400, 400)
    with pytest.raises(NotImplementedError, match="explicit attention mask"):
        logits(model, ids, SMALL, attention_mask=mask)


def test_packed_sequences_are_refused(model, ids):
    positions = torch.arange(200).repeat(2)[None].expand(2, -1)
    with pytest.raises(NotImplementedError, match="plainly causal"):
        logits(model, ids, SMALL, position_ids=positions, use_cache=False)


@torch.no_grad()
def test_fixed_size_cache_is_refused(model, ids):
    with (
        condensed_attention(model),
        pytest.raises(NotImplementedError, match="a cache that grows"),
    ):
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=3,
            cache_implementation="static",
        )  # fmt: skip


@pytest.mark.parametrize("name", ["scale", "causal"])
def test_what_the_model_sets_is_refused(model, name):
    with pytest.raises(TypeError, match=name), condensed_attention(model, **{name: 1}):
        pass


def test_decode_comparison_is_zero_for_a_covering_budget(model, ids):
    covered, small = evaluate.compare_decode(model, ids[:1], [COVERING, SMALL], decode_tokens=12)
    assert covered.tokens == 12
    assert abs(covered.kl) < 1e-5
    assert covered.top1 == 1
    assert abs(covered.dppl_percent) < 0.1
    assert small.kl > 10 * abs(covered.kl)


@torch.no_grad()
def test_decode_comparison_equals_one_dense_pass(model, ids):
    (result,) = evaluate.compare_decode(model, ids[:1], [COVERING], decode_tokens=12)
    scores = logits(model, ids[:1])[0, -13:-1].log_softmax(-1)
    nll = -scores.gather(-1, ids[0, -12:, None]).mean()
    assert result.ppl_dense == pytest.approx(nll.exp().item(), rel=1e-4)


def test_prefill_comparison_is_zero_for_a_covering_budget(model, ids):
    result = evaluate.compare_prefill(model, ids[:1], COVERING)
    assert result.tokens == 399
    assert abs(result.kl) < 1e-5
    assert evaluate.compare_prefill(model, ids[:1], SMALL).kl > 1e-3


def test_decode_comparison_needs_enough_text(model, ids):
    with pytest.raises(ValueError, match="at least 402"):
        evaluate.compare_decode(model, ids[:1], [SMALL], decode_tokens=400)


def test_needles_share_no_word_and_no_first_letter():
    needles = evaluate.make_needles(20, seed=3)
    words = [word for needle in needles for word in needle.words.split()]
    assert len(set(words)) == 40
    assert len({needle.code[0] for needle in needles}) == 20
    with pytest.raises(ValueError, match="1 to 20"):
        evaluate.make_needles(21)


class CharacterTokenizer:
    """One token per character."""

    def __call__(self, text, add_special_tokens):
        return type("Encoding", (), {"input_ids": [ord(c) % 97 for c in text]})


def test_needles_are_hidden_whole_within_the_distance():
    needles = evaluate.make_needles(4)
    tokenizer = CharacterTokenizer()
    document = evaluate.hide_needles(tokenizer, "some text\n" * 500, needles, 3000, 1800)
    assert len(document) == 3000
    for needle in needles:
        statement = tokenizer(needle.statement, add_special_tokens=False).input_ids
        found = [n for n in range(3000) if document[n : n + len(statement)] == statement]
        assert len(found) == 1
        assert found[0] >= 1200
    with pytest.raises(ValueError, match="longer text"):
        evaluate.hide_needles(tokenizer, "some text\n" * 100, needles, 3000, 1800)


def test_needles_are_asked_and_scored(model):
    needles = evaluate.make_needles(2)
    document = [n % 97 for n in range(400)]
    share = evaluate.ask_needles(model, CharacterTokenizer(), document, needles, SMALL, 400)
    assert share in (0, 0.5, 1)
