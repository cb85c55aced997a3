"""The transformers hook, on a small random model."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from condensate_ext.hf import condensed_attention, replaced_attention  # noqa: E402

from tests.testkit import tiny_lm  # noqa: E402

COVERING = {"topk": 640, "selector": "block"}
SMALL = {"window": 16, "anchors": 8, "topk": 64, "selector": "block"}


@pytest.fixture(scope="module")
def model():
    return tiny_lm.make_model()


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


@torch.no_grad()
def test_replaced_attention_sees_every_layer_once_and_in_order(model, ids):
    """What it is given is what the layer's own projections make, with positions encoded."""
    seen = []

    def zero(query, key, value, *, scale):
        seen.append((query.shape, key.shape, value, scale))
        return torch.zeros_like(query)

    with replaced_attention(model, zero):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert [entry[0] for entry in seen] == [(2, 4, 400, 16)] * 2
    assert [entry[1] for entry in seen] == [(2, 2, 400, 16)] * 2
    assert seen[0][3] == pytest.approx(16**-0.5)
    first = model.model.layers[0]
    embedded = first.input_layernorm(model.model.embed_tokens(ids))
    projected = first.self_attn.v_proj(embedded).view(2, 400, 2, 16).transpose(1, 2)
    torch.testing.assert_close(seen[0][2], projected)
    same = hidden[ids == ids[0, 0]]  # nothing was attended: a token's state is the token's alone
    assert len(same) > 1
    torch.testing.assert_close(same, same[:1].expand_as(same))
