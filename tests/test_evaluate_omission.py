"""The audit of omitted mass and the texts of an evaluation."""

import condensate_ext as ce
import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from condensate_ext.audit import mean_interval  # noqa: E402
from condensate_ext.evaluate import omission, policies, text  # noqa: E402
from condensate_ext.evaluate.omission import Audit  # noqa: E402

from tests.testkit import far_field, oracle, tiny_lm  # noqa: E402
from tests.testkit.definition import Ranges, listed_blocks  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = {"window": 8, "anchors": 4, "topk": 10, "selector": "exact", "far_field": False}
BLOCK = {**EXACT, "topk": 64, "selector": "block"}
TOKENS = 400


@pytest.fixture(scope="module")
def model():
    return tiny_lm.make_model()


@pytest.fixture
def ids():
    return torch.randint(90, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def by_definition(query, key, value, rows):
    """Omitted mass [heads, rows] and relative output error of EXACT, from scores in float64."""
    omitted, outputs, dense = [], [], []
    for head in range(query.shape[1]):
        for row in rows.tolist():
            q, k, v = (
                t.double() for t in (query[0, head, row], key[0, head // 2], value[0, head // 2])
            )
            weights = (k[: row + 1] @ q / 4).softmax(-1)
            kept = torch.zeros(row + 1, dtype=torch.bool)
            kept[:4] = True
            kept[-8:] = True
            far = weights.masked_fill(kept, -1)
            kept[far.topk(10).indices] = True
            omitted.append(weights[~kept].sum())
            dense.append(weights @ v[: row + 1])
            outputs.append(weights[kept] / weights[kept].sum() @ v[: row + 1][kept])
    outputs, dense = torch.stack(outputs), torch.stack(dense)
    return torch.stack(omitted).view(-1, len(rows)), (outputs - dense).norm() / dense.norm()


def test_audit_is_the_definition_on_every_layers_own_queries(model, ids):
    rows = torch.tensor([150, 233, 399])
    shares = []
    (found,) = omission.audit(model, ids, [EXACT], rows, shares.append)
    assert found.omitted.shape == found.estimate.shape == (2, 4, 3)
    assert found.output_error.shape == (1, 2)
    assert sum(shares) == pytest.approx(1)
    for layer in range(2):
        captured = omission.capture_layer(model, ids, layer)
        omitted, error = by_definition(*captured, rows)
        assert omitted.max() > 1e-3
        torch.testing.assert_close(found.omitted[layer].double(), omitted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.estimate[layer].double(), omitted, atol=1e-5, rtol=1e-4)
        assert found.output_error[0, layer].item() == pytest.approx(error.item(), rel=1e-3)


def test_rows_alone_are_decoding_steps(model, ids):
    """The exact selector has one support a query in either case, a block list depends on the
    tile."""
    rows = torch.tensor([150, 233, 399])
    together, alone = (omission.audit(model, ids, [EXACT, BLOCK], rows, alone=a) for a in (0, 1))
    for field in ("omitted", "estimate", "output_error"):
        torch.testing.assert_close(
            getattr(alone[0], field), getattr(together[0], field), atol=1e-5, rtol=1e-3
        )
    assert not torch.equal(alone[1].omitted, together[1].omitted)
    query, key, _ = omission.capture_layer(model, ids, 1)
    only, kept = query[:, :, 233:234], key[:, :, :234]
    support = {**BLOCK, "far_field": False}
    _, lse, estimate = ce.attention_forward(only, kept, kept, **support)
    omitted = ce.omitted_mass(only, kept, lse)[0, :, 0]
    torch.testing.assert_close(alone[1].omitted[1, :, 1], omitted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone[1].estimate[1, :, 1], estimate[0, :, 0], atol=1e-5, rtol=1e-4)


def test_covering_budget_leaves_nothing_out_and_blocks_leave_more_than_tokens(model, ids):
    chosen = [policies.covering(TOKENS), {**BLOCK, "selector": "exact"}, BLOCK]
    covered, exact, block = omission.audit(model, ids, chosen)
    assert covered.omitted.max() < 1e-5
    assert covered.output_error.max() < 1e-5
    assert (block.omitted >= exact.omitted - 1e-5).all()
    assert block.omitted.mean() > exact.omitted.mean()
    assert (block.estimate - block.omitted).abs().max() > 1e-4  # an estimate, unlike exact's


def whole_blocks(query, key, policy):
    """By the definition, the mass [heads, queries] outside what a call with far field attends."""
    (heads, query_len), kv_len = query.shape[1:3], key.shape[2]
    ranges = Ranges(query_len, kv_len, policy["window"], policy["anchors"], causal=True)
    summaries = ce.block_summaries(key, selector=policy["selector"])
    lists = ce.select_blocks(query, summaries, key, kv_len=kv_len, **{**policy, "far_field": True})
    listed, _ = listed_blocks(*lists, kv_len)
    attended = far_field.divide(ranges, listed, heads).attended
    lse = oracle.attention(query, key, key, attended).lse
    return oracle.omitted_mass(query, key, lse, ranges.visible())[0]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("selector", ["block", "quest", "mean"])
@pytest.mark.parametrize("window, anchors", [(8, 4), (0, 0), (70, 65)])
def test_with_far_field_the_audit_is_of_the_whole_blocks_that_it_attends(
    model, ids, selector, window, anchors, alone
):
    policy = {"window": window, "anchors": anchors, "topk": 64, "selector": selector}
    rows = torch.tensor([250, 333, 399])
    (found,) = omission.audit(model, ids, [policy], rows, alone=alone)
    (given,) = omission.audit(model, ids, [{**policy, "far_field": True}], rows, alone=alone)
    for field in ("omitted", "estimate", "output_error"):
        assert torch.equal(getattr(found, field), getattr(given, field)), "it is the default"
    for layer in range(2):
        query, key, value = omission.capture_layer(model, ids, layer)
        if alone:
            calls = [
                (query[:, :, p : p + 1], key[:, :, : p + 1], value[:, :, : p + 1])
                for p in rows.tolist()
            ]
            places = [0]
        else:
            calls, places = [(query, key, value)], rows
        omitted = torch.cat([whole_blocks(q, k, policy)[:, places] for q, k, _ in calls], 1)
        forward = [[t[0, :, places] for t in ce.attention_forward(*c, **policy)] for c in calls]
        out, _, estimate = (torch.cat(parts, 1) for parts in zip(*forward, strict=True))
        dense = omission.dense_attention(query, key, value)[0, :, rows]
        assert omitted.max() > 0.05
        torch.testing.assert_close(found.omitted[layer].double(), omitted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.estimate[layer], estimate, atol=1e-6, rtol=1e-5)
        error = (out - dense).norm() / dense.norm()
        assert found.output_error[0, layer].item() == pytest.approx(error.item(), rel=1e-3)


def test_what_is_attended_depends_on_the_far_field(model, ids):
    """Whole blocks leave out less than the keys that they hold, pools as much as nothing."""
    far = {**BLOCK, "far_field": True}
    without, with_it = omission.audit(model, ids, [BLOCK, far])
    assert with_it.omitted.mean() < without.omitted.mean()
    assert with_it.omitted.mean() > 0.05
    assert (with_it.output_error < without.output_error).all()


def test_a_call_that_attends_everything_omits_nothing(model):
    """Also where selecting would not be faster, though the budget does not reach every key."""
    ids = torch.randint(90, (1, 1100), generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([600, 1099])
    policy = {"window": 8, "anchors": 4, "topk": 512}
    found, listed = omission.audit(model, ids, [policy, {**policy, "topk": 256}], rows)
    assert found.omitted.max() < 1e-5 and not found.estimate.any()
    assert (listed.omitted > 1e-3).any() and listed.estimate.any()


def test_no_layer_beyond_the_models(model, ids):
    with pytest.raises(ValueError, match="the model has 2 layers, none is number 2"):
        omission.capture_layer(model, ids, 2)


@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize("tokens", [3, 100, 5000])
def test_audited_rows_are_drawn_from_the_last_halves_together(tokens, documents):
    drawn = omission.audited_rows(tokens, documents)
    half = tokens - tokens // 2
    assert sum(map(len, drawn)) == documents * min(omission.AUDITED_ROWS, half)
    assert len(drawn) == documents
    for rows in drawn:
        assert rows.unique().tolist() == rows.tolist()
        assert tokens // 2 <= rows[0] <= rows[-1] < tokens
        assert half > 256 or rows.tolist() == [*range(tokens // 2, tokens)]
        assert half < 256 or rows.diff().unique().numel() > 5  # not evenly spaced
        assert half < 256 or abs(rows.double().mean() / tokens - 0.75) < 0.04
    assert documents == 1 or half < 256 or not torch.equal(drawn[0], drawn[1])
    again = omission.audited_rows(tokens, documents)
    assert all(map(torch.equal, drawn, again))


def test_an_audit_says_what_its_rows_are_a_sample_of(model, ids):
    every = torch.arange(TOKENS // 2, TOKENS)
    (whole,) = omission.audit(model, ids, [EXACT], every)
    (part,) = omission.audit(model, ids, [EXACT], torch.arange(TOKENS // 2, TOKENS, 4))
    assert whole.population == part.population == TOKENS // 2
    exact, found = omission.summary(whole), omission.summary(part)
    assert exact["omitted_low"] == exact["omitted_mean"] == exact["omitted_high"]
    assert found["omitted_low"] < exact["omitted_mean"] < found["omitted_high"]
    assert 0.05 < found["omitted_high"] - found["omitted_low"] < 0.4


def test_summaries_of_an_audit():
    omitted = torch.arange(200).view(1, 2, 100) / 1000
    estimate = omitted + torch.tensor([0.01, -0.03])[None, :, None]
    first = Audit(omitted[..., :50], estimate[..., :50], torch.tensor([[0.2]]), 400)
    second = Audit(omitted[..., 50:], estimate[..., 50:], torch.tensor([[0.4]]), 600)
    whole = omission.joined([first, second])
    found = omission.summary(whole)
    assert found["omitted_mean"] == pytest.approx(0.0995)
    # 100 draws of 1,000 rows, each the mean of both heads.
    _, low, high = mean_interval(omitted[0].mean(0), 1000, 0.95)
    assert found["omitted_low"] == pytest.approx(low.item(), abs=1e-9)
    assert found["omitted_high"] == pytest.approx(high.item(), abs=1e-9)
    assert found["omitted_p99"] == pytest.approx(0.197)
    assert found["omitted_max"] == pytest.approx(0.199)
    assert found["estimate_mean"] == pytest.approx(0.0895)
    assert found["estimate_error"] == pytest.approx(0.02)
    assert found["output_error"] == pytest.approx(0.3)
    ((layer,),) = (omission.by_layer_and_head(whole),)
    assert (layer["layer"], layer["output_error"]) == (0, pytest.approx(0.3))
    assert [h["omitted_max"] for h in layer["heads"]] == pytest.approx([0.099, 0.199])
    assert [h["estimate_error"] for h in layer["heads"]] == pytest.approx([0.01, 0.03])
    _, _, highs = mean_interval(omitted[0], 1000, 0.95)
    assert [h["omitted_high"] for h in layer["heads"]] == pytest.approx(highs.tolist())


# Texts.


def test_windows_come_in_turn_from_every_document_and_do_not_overlap(tmp_path):
    tokenizer = tiny_lm.make_tokenizer()
    documents = ["".join(f"{name} {n:04}\n" for n in range(lines)) for name, lines in
                 (("a", 100), ("b", 5), ("c", 40))]  # fmt: skip
    path = tmp_path / "text.txt"
    path.write_text("\0".join(documents), encoding="utf-8")
    windows = text.read_windows(path, tokenizer, 101, 10)  # one special token and 100 of text
    assert all(len(w.ids) == 101 and w.ids[0] == tiny_lm.BEGIN for w in windows)
    shown = [tokenizer.decode(w.ids[1:]) for w in windows]
    assert all(w.text.startswith(s) for w, s in zip(windows, shown, strict=True))
    # 100 characters are 14 lines and two characters; the next window begins behind that line.
    starts = [s.split("\n")[0] for s in shown]
    assert starts == [
        "a 0000",
        "c 0000",
        "a 0015",
        "c 0015",
        "a 0030",
        "a 0045",
        "a 0060",
        "a 0075",
    ]
    assert [w.ids for w in text.read_windows(path, tokenizer, 101, 3)] == [
        w.ids for w in windows[:3]
    ]
    with pytest.raises(ValueError, match=r"none of its 3 documents has 1000 tokens"):
        text.read_windows(path, tokenizer, 1000, 1)


def test_leading_tokens_are_the_tokenizers_own():
    tokenizer = tiny_lm.make_tokenizer()
    assert text.leading_tokens(tokenizer) == [tiny_lm.BEGIN]
    tokenizer.backend_tokenizer.post_processor = None
    assert text.leading_tokens(tokenizer) == []
