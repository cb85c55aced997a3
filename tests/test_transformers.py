"""The transformers hook against the same model with transformers' own attention."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

import condensate_ext.transformers as condensate  # noqa: E402
from condensate_ext.transformers import computes, condensed_attention, replaced_attention  # noqa: E402
from condensate_ext.transformers.cache import CondensedLayer, CondensedStaticLayer  # noqa: E402

from tests.testkit import tiny_lm  # noqa: E402

COVERING = {"topk": 640}
SMALL = {"window": 16, "anchors": 8, "topk": 64}
STEP = {**SMALL, "shortlist": 128}
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


@pytest.fixture(scope="module")
def shared_model():
    return tiny_lm.make_model()


@pytest.fixture
def model(shared_model):
    return copy.deepcopy(shared_model)


@pytest.fixture
def ids():
    return torch.randint(97, (2, 400), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids, policy=None, **kwargs):
    if policy is None:
        return model(input_ids=ids, **kwargs).logits
    with condensed_attention(model, **policy):
        return model(input_ids=ids, **kwargs).logits


@torch.no_grad()
def generated(model, ids, new=12, policy=None, **kwargs):
    """New tokens and their scores."""
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    options = {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0, "do_sample": False}
    call = {**options, "return_dict_in_generate": True, "output_logits": True, **kwargs}
    if policy is None:
        result = model.generate(ids, **call)
    else:
        with condensed_attention(model, **policy):
            result = model.generate(ids, **call)
    return result.sequences[:, ids.shape[1] :], torch.stack(result.logits, 1)


def assert_same_generation(model, ids, policy=COVERING, **kwargs):
    tokens, scores = generated(model, ids, **kwargs)
    ours, our_scores = generated(model, ids, policy=policy, **kwargs)
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(our_scores, scores, **CLOSE)


# --- prompts


def test_covering_budget_gives_the_dense_models_logits(model, ids, device):
    model, ids = model.to(device), ids.to(device)
    torch.testing.assert_close(logits(model, ids, COVERING), logits(model, ids), **CLOSE)


@pytest.mark.parametrize("selector", ["block", "quest", "mean", "exact"])
def test_small_budget_changes_late_tokens_and_keeps_those_it_covers(model, ids, selector):
    dense, ours = logits(model, ids), logits(model, ids, {**SMALL, "selector": selector})
    torch.testing.assert_close(ours[:, :24], dense[:, :24], **CLOSE)
    assert (ours[:, 300:] - dense[:, 300:]).abs().max() > 1e-2


def test_the_far_field_is_on_unless_the_policy_says_otherwise(model, ids):
    on, off = (logits(model, ids, {**SMALL, "far_field": value}) for value in (True, False))
    assert torch.equal(logits(model, ids, SMALL), on) and not torch.equal(on, off)


@torch.no_grad()
def test_exact_prefill_does_not_depend_on_how_it_is_cut(model, ids):
    policy = {**SMALL, "selector": "exact"}
    whole = logits(model, ids, policy)
    with condensed_attention(model, **policy):
        first = model(input_ids=ids[:, :250], use_cache=True)
        rest = model(input_ids=ids[:, 250:], cache=first.cache)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_are_rows_by_themselves(model, ids, side):
    """Also with a small budget: padding is neither attended nor listed nor condensed."""
    padded = torch.full((2, 430), 5)
    mask = torch.zeros_like(padded)
    own = slice(30, None) if side == "left" else slice(0, 400)
    padded[1, own], mask[1, own] = ids[1], 1
    padded[0, :400], padded[0, 400:], mask[0] = ids[0], 7, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ours = logits(model, padded, SMALL, attention_mask=mask, position_ids=positions)
    alone = logits(model, ids[1:], SMALL)
    torch.testing.assert_close(ours[1:, own], alone, **CLOSE)
    assert torch.equal(ours[:1], logits(model, padded[:1], SMALL))


def test_packed_sequences_are_calls_by_themselves(model, ids):
    positions = torch.cat([torch.arange(150), torch.arange(250)])[None].expand(2, -1)
    ours = logits(model, ids, SMALL, position_ids=positions, use_cache=False)
    parts = [logits(model, ids[:, :150], SMALL), logits(model, ids[:, 150:], SMALL)]
    torch.testing.assert_close(ours, torch.cat(parts, 1), **CLOSE)


# --- generation


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_covering_budget_is_the_dense_one(model, ids, cache):
    assert_same_generation(model, ids, cache_implementation=cache)


def left_padded(ids):
    mask = torch.ones_like(ids)
    mask[1, :77] = 0
    return mask


def test_generation_of_padded_prompts(model, ids):
    mask = left_padded(ids)
    assert_same_generation(model, ids, attention_mask=mask)
    both = generated(model, ids, policy=STEP, attention_mask=mask)[1]
    alone = generated(model, ids[1:, 77:], policy=STEP)[1]
    torch.testing.assert_close(both[1:], alone, **CLOSE)


def compiled():
    """What lets generate() compile its steps on the CPU too."""
    options = transformers.CompileConfig(fullgraph=True, backend="eager", mode=None)
    options._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": options}


def test_padding_in_a_compiled_step_is_refused(model, ids):
    with pytest.raises(RuntimeError, match="padding in a compiled"):  # torch wraps what is raised
        generated(
            model, ids, policy=COVERING, attention_mask=left_padded(ids), **compiled()
        )  # fmt: skip


@torch.no_grad()
def test_padding_in_a_fixed_cache(model, ids):
    mask = left_padded(ids)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    prompt, step = slice(0, 390), slice(390, 400)
    outs = []
    for policy in (None, COVERING):
        cache = transformers.StaticCache(config=model.config, max_cache_len=448)
        for part in (prompt, step):
            last = logits(
                model, ids[:, part], policy, cache=cache, position_ids=positions[:, part],
                attention_mask=mask[:, : part.stop],
            )  # fmt: skip
        outs.append(last)
    torch.testing.assert_close(outs[1], outs[0], **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 4},
        {"prefill_chunk_size": 150},
    ],
    ids=str,
)
def test_ways_to_generate(model, ids, options):
    rows = ids[:1] if "prompt_lookup_num_tokens" in options else ids
    dense = model.generate(
        rows, attention_mask=torch.ones_like(rows), max_new_tokens=10, pad_token_id=0, **options
    )
    with condensed_attention(model, **COVERING):
        ours = model.generate(
            rows, attention_mask=torch.ones_like(rows), max_new_tokens=10, pad_token_id=0, **options
        )
    assert torch.equal(ours, dense)


def test_assisted_and_sampled_generation(model, ids):
    assistant = tiny_lm.make_model()
    with condensed_attention(model, **COVERING):
        ours = model.generate(
            ids[:1], attention_mask=torch.ones_like(ids[:1]), assistant_model=assistant,
            max_new_tokens=10, min_new_tokens=10, pad_token_id=0, do_sample=False,
        )  # fmt: skip
    tokens, _ = generated(model, ids[:1], new=10)
    assert torch.equal(ours[:, 400:], tokens)
    for policy in (None, COVERING):
        torch.manual_seed(3)
        sampled = generated(model, ids, policy=policy, do_sample=True)[0]
        if policy is None:
            expected = sampled
    assert torch.equal(sampled, expected)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 5, 16])
def test_a_step_is_the_decode_operator_over_the_layers_own_cache(model, ids, count):
    """Summaries that were updated are those made anew, and the policy is handed on."""
    seen = []
    with condensed_attention(model, **STEP):
        cache = model(input_ids=ids[:, :300], use_cache=True).cache
        model(input_ids=ids[:, 300 : 300 + count], cache=cache)
        original = computes.attention_with_kvcache

        def spy(query, key, value, lengths, **kwargs):
            out = original(query, key, value, lengths, **kwargs)
            fresh = type(kwargs["summaries"]).empty_for(key, paged=False)
            fresh.update_(key, value, lengths, appended=key.shape[2])
            again = original(query, key, value, lengths, **{**kwargs, "summaries": fresh})
            seen.append((query.shape, lengths.tolist(), kwargs["topk"], torch.equal(out, again)))
            return out

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(computes, "attention_with_kvcache", spy)
            model(input_ids=ids[:, 300 + count : 300 + 2 * count], cache=cache)
    assert all(type(layer) is CondensedLayer for layer in cache.layers)
    width = 64  # head_dim 16 lies in buffers of the decode kernels' narrowest
    assert seen == [((2, 4, count, width), [300 + 2 * count] * 2, 64, True)] * 2


@torch.no_grad()
def test_summaries_follow_the_cache(model, ids):
    """Cropped, reordered, repeated and selected caches give what fresh ones give."""
    with condensed_attention(model, **STEP):
        cache = model(input_ids=ids[:, :300], use_cache=True).cache
        model(input_ids=ids[:, 300:303], cache=cache)
        cache.crop(-60)
        rows = torch.tensor([1, 0])
        cache.reorder_cache(rows)
        model(input_ids=ids[rows, 243:250], cache=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        ours = model(input_ids=ids[[0, 1], 250:252], cache=cache).logits
        fresh = model(input_ids=ids[[0, 1], :243], use_cache=True).cache
        model(input_ids=ids[:, 243:250], cache=fresh)
        expected = model(input_ids=ids[:, 250:252], cache=fresh).logits
    torch.testing.assert_close(ours, expected, **CLOSE)


@torch.no_grad()
def test_a_cache_goes_from_dense_to_condensed_and_back(model, ids):
    cache = model(input_ids=ids[:, :300], use_cache=True).cache
    with condensed_attention(model, **COVERING):
        model(input_ids=ids[:, 300:301], cache=cache)
    ours = model(input_ids=ids[:, 301:310], cache=cache).logits
    torch.testing.assert_close(ours, logits(model, ids)[:, 301:310], **CLOSE)


@torch.no_grad()
def test_layers_of_other_kinds_stay_what_they_are(model, ids):
    class Rounded(transformers.cache_utils.DynamicLayer):
        """Gives back other tensors than it holds, as quantized layers do."""

        def update(self, *states, **kwargs):
            return tuple(x.half().float() for x in super().update(*states, **kwargs))

    outs = []
    for policy in (None, COVERING):
        cache = transformers.DynamicCache(config=model.config)
        cache.layers = [Rounded() for _ in cache.layers]
        logits(model, ids[:, :390], policy, cache=cache)
        outs.append(logits(model, ids[:, 390:], policy, cache=cache))
        assert all(type(layer) is Rounded for layer in cache.layers)
    torch.testing.assert_close(outs[1], outs[0], **CLOSE)


def test_compiled_steps_over_a_fixed_cache(model, ids):
    """generate() compiles its steps over a static cache; none of them may fall out of the graph."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    tokens, _ = generated(model, ids)
    ours, _ = generated(model, ids, policy=COVERING, **compiled())
    assert torch.equal(ours, tokens)
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]


@torch.no_grad()
def test_static_layers_keep_summaries():
    model = tiny_lm.make_model(head_dim=64)
    ids = torch.randint(97, (2, 400), generator=torch.Generator().manual_seed(1))
    cache = transformers.StaticCache(config=model.config, max_cache_len=448)
    with condensed_attention(model, **STEP):
        model(input_ids=ids[:, :300], cache=cache)
        ours = [model(input_ids=ids[:, t : t + 1], cache=cache).logits for t in range(300, 330)]
        assert all(type(layer) is CondensedStaticLayer for layer in cache.layers)
        growing = model(input_ids=ids[:, :300], use_cache=True).cache
        theirs = [model(input_ids=ids[:, t : t + 1], cache=growing).logits for t in range(300, 330)]
    torch.testing.assert_close(torch.cat(ours, 1), torch.cat(theirs, 1), **CLOSE)


# --- switching


@torch.no_grad()
def test_enable_and_disable(model, ids):
    dense = logits(model, ids)
    condensate.enable(model, **SMALL)
    assert model.config._attn_implementation == "condensate"
    ours = model(input_ids=ids).logits
    assert not torch.allclose(ours, dense)
    with condensed_attention(model, **COVERING):
        torch.testing.assert_close(model(input_ids=ids).logits, dense, **CLOSE)
    assert torch.equal(model(input_ids=ids).logits, ours)
    condensate.enable(model, **COVERING)
    torch.testing.assert_close(model(input_ids=ids).logits, dense, **CLOSE)
    condensate.disable(model)
    condensate.disable(model)
    assert torch.equal(model(input_ids=ids).logits, dense)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_context_ends_also_after_an_error(model, ids):
    dense = logits(model, ids)
    with pytest.raises(RuntimeError, match="from inside"), condensed_attention(model, **SMALL):
        raise RuntimeError("from inside")
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, ids), dense)


@torch.no_grad()
def test_contexts_end_in_any_order(model, ids):
    dense, small = logits(model, ids), logits(model, ids, SMALL)
    first, second = condensed_attention(model, **COVERING), condensed_attention(model, **SMALL)
    first.__enter__()
    second.__enter__()
    assert torch.equal(model(input_ids=ids).logits, small)
    first.__exit__(None, None, None)
    assert torch.equal(model(input_ids=ids).logits, small)
    second.__exit__(None, None, None)
    assert torch.equal(model(input_ids=ids).logits, dense)


def test_models_that_share_a_config_switch_by_themselves(ids):
    one = tiny_lm.make_model()
    other = type(one)(one.config).eval()
    dense = logits(other, ids)
    with condensed_attention(one, **SMALL):
        assert torch.equal(logits(other, ids), dense)
        assert other.config._attn_implementation == "sdpa"


def test_another_threads_passes_stay_dense(model, ids):
    dense, condensed = logits(model, ids), logits(model, ids, SMALL)
    inside, done, wrong = threading.Event(), threading.Event(), []

    def passes():
        inside.wait()
        wrong.extend(n for n in range(20) if not torch.equal(logits(model, ids), dense))
        done.set()

    thread = threading.Thread(target=passes)
    thread.start()
    with condensed_attention(model, **SMALL):
        inside.set()
        ours = [torch.equal(logits_here(model, ids), condensed) for _ in range(20)]
        done.wait()
    thread.join()
    assert not wrong and all(ours)


@torch.no_grad()
def logits_here(model, ids):
    return model(input_ids=ids).logits


@torch.no_grad()
def test_copies_made_inside_are_models_of_their_own(model, ids):
    dense = logits(model, ids)
    with condensed_attention(model, **SMALL):
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin, ids), dense)
    assert torch.equal(twin(input_ids=ids).logits, dense)
    condensate.enable(model, **SMALL)
    ours = model(input_ids=ids).logits
    twin = copy.deepcopy(model)
    condensate.disable(model)
    assert torch.equal(twin(input_ids=ids).logits, ours)
    assert torch.equal(model(input_ids=ids).logits, dense)


def test_saving_inside_leaves_no_trace(model, ids, tmp_path):
    with condensed_attention(model, **SMALL):
        model.save_pretrained(tmp_path)
    assert "condensate" not in (tmp_path / "config.json").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, ids), logits(model, ids))


def test_loading_with_the_implementations_name(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="condensate"
    )
    assert_close_to_dense = {"atol": 2e-4, "rtol": 2e-4}
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), **assert_close_to_dense)
    assert torch.equal(generated(loaded, ids)[0], generated(model, ids)[0])
    condensate.enable(loaded, **SMALL)
    with torch.no_grad():
        ours = loaded(input_ids=ids).logits
    assert torch.equal(ours, logits(model, ids, SMALL))
    condensate.disable(loaded)
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))


@torch.no_grad()
def test_layers_may_run_other_policies(model, ids):
    dense, small = logits(model, ids), logits(model, ids, SMALL)
    covered = dict.fromkeys(range(2), COVERING)
    torch.testing.assert_close(logits(model, ids, {**SMALL, "layers": covered}), dense, **CLOSE)
    every = dict.fromkeys(range(2))
    torch.testing.assert_close(logits(model, ids, {**SMALL, "layers": every}), dense, **CLOSE)
    first = logits(model, ids, {**SMALL, "layers": {0: None}})
    second = logits(model, ids, {**SMALL, "layers": {1: None}})
    assert not torch.allclose(first, second)
    assert all(not torch.allclose(one, both) for one in (first, second) for both in (dense, small))
    with pytest.raises(ValueError, match="layers names layer 2, expected one of 0 to 1"):
        condensate.enable(model, layers={2: None})
    with pytest.raises(ValueError, match="topk is 65"):
        condensate.enable(model, layers={1: {"topk": 65}})


@torch.no_grad()
def test_dense_layers_of_steps(model, ids):
    """Steps of a dense layer attend every key of the cache, also with sinks and padding."""
    policy = {**STEP, "layers": dict.fromkeys(range(2))}
    assert_same_generation(model, ids, policy=policy)
    assert_same_generation(model, ids, policy=policy, attention_mask=left_padded(ids))


# --- refusals


def test_policies_are_checked_before_anything_runs(model):
    for wrong, message in (
        ({"scale": 1.0}, "come from the model"),
        ({"causal": False}, "come from the model"),
        ({"budget": 64}, "unknown"),
    ):
        with pytest.raises(TypeError, match=message):
            condensate.enable(model, **wrong)
    for wrong, message in (
        ({"topk": 100}, "topk is 100, expected a multiple of 64"),
        ({"window": -1}, "window is -1"),
        ({"selector": "blocks"}, "selector is \"blocks\""),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"shortlist": 64, "topk": 128}, "shortlist is 64, expected at least topk"),
        ({"selector": "exact", "far_field": True}, "far_field is True"),
    ):
        with pytest.raises(ValueError, match=message):
            condensate.enable(model, **wrong)
    assert model.config._attn_implementation == "sdpa"


def test_what_cannot_be_honoured_names_the_layer(model, ids):
    with pytest.raises(NotImplementedError, match=r"explicit attention mask in LlamaAttention of"):
        logits(model, ids, SMALL, attention_mask=torch.zeros(2, 1, 400, 400))
    with pytest.raises(NotImplementedError, match=r"dropout=0.5 in LlamaAttention of layer 0"):
        model.train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        logits(model, ids, SMALL)


@torch.no_grad()
def test_masks_that_do_not_cover_the_cache_are_refused(model, ids):
    with condensed_attention(model, **SMALL):
        cache = model(input_ids=ids[:, :300], use_cache=True).cache
        with pytest.raises(NotImplementedError, match="attention_mask of 200 tokens for 301"):
            model(
                input_ids=ids[:, 300:301], cache=cache,
                attention_mask=torch.ones(2, 200, dtype=torch.long),
            )  # fmt: skip
        holes = torch.ones_like(ids)
        holes[0, 100] = 0
        with pytest.raises(NotImplementedError, match="zeros amid a row"):
            model(input_ids=ids, attention_mask=holes)


def test_unknown_arguments_of_attention_are_refused(model, ids):
    with pytest.raises(NotImplementedError, match=r"block_indices=a tensor \[2\].*layer 0"):
        logits(model, ids, SMALL, block_indices=torch.zeros(2))


# --- the function of a caller


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
