"""`python -m condensate_ext evaluate` and bench.fidelity from the command line to the files."""

import html
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("rich")

from condensate_ext import cli  # noqa: E402
from condensate_ext.evaluate import (  # noqa: E402
    Answer,
    evaluation,
    page,
    policies,
    protocols,
    report,
    subject,
)

from bench import fidelity  # noqa: E402
from tests.testkit import tiny_lm  # noqa: E402
from tools import readme_table  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 600
SHARED = Path(os.environ.get("CONDENSATE_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny_lm.save(path, [tiny_lm.make_text(70, seed) for seed in range(2)])
    return path


def arguments(folder, *more):
    return [
        "--model", str(folder / "model"), "--text", str(folder / "text.txt"),
        "--device", "cpu", *more,
    ]  # fmt: skip


def small(folder, output, *more):
    return [
        "evaluate",
        *arguments(folder, "--context", str(CONTEXT), "--documents", "2", "--output", str(output)),
        "--decode-tokens", "6", "--needles", "2", "--new-tokens", "6", "--batch", "2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(one_thread, folder, tmp_path_factory):
    """A budget that covers the context beside one that does not, every protocol."""
    pytest.importorskip("matplotlib")
    output = tmp_path_factory.mktemp("evaluation")
    more = ("--budgets", "384", "640", "--no-far-field", "--shortlist", "64")
    assert cli.main(small(folder, output, *more)) == 0
    return output, json.loads((output / "evaluation.json").read_text(encoding="utf-8"))


def test_every_protocol_has_a_record_a_policy(evaluated):
    _, document = evaluated
    found = [(r["protocol"], r["selector"], r["keys"]) for r in document["records"]]
    both = [("block", 384), ("block", 640)]
    other = ("dense, unfused", None)
    assert found == [
        (protocol, *case)
        for protocol, first in (
            ("decode", [other]), ("needles", [("dense", None)]), ("prefill", [other]),
            ("survival", [other]), ("omitted", []), ("steps", []),
        )
        for case in [*first, *both]
    ]  # fmt: skip
    assert document["settings"]["context"] == CONTEXT
    assert set(document["seconds"]) == set(evaluation.PROTOCOLS)
    assert all(r["far_field"] in (False, None) for r in document["records"])


def test_covering_budget_and_control_measure_nothing(evaluated):
    _, document = evaluated
    dense_needles = next(r for r in document["records"] if r["selector"] == "dense")
    for r in document["records"]:
        if r["keys"] == 384:
            continue
        if r["protocol"] in ("decode", "prefill"):
            assert abs(r["kl"]) < 1e-5
            assert abs(r["dppl_percent_worst"]) < 0.1
            assert (r["top1"], r["documents"], r["tokens"]) == (1, 2, 12)
        if r["protocol"] == "survival":
            assert (r["survived"], r["identical_tokens"], r["documents"]) == (1, 6, 2)
        if r["protocol"] == "needles":
            assert r["needle_all"] == dense_needles["needle_all"]
            assert (r["documents"], r["tokens"]) == (2, 4)
        if r["protocol"] in ("omitted", "steps"):
            assert r["omitted_max"] < 1e-5
            assert r["output_error"] < 1e-5


def test_small_budget_shows_and_is_told_by_layer_and_head(evaluated):
    _, document = evaluated
    by_protocol = {r["protocol"]: r for r in document["records"] if r["keys"] == 384}
    assert by_protocol["decode"]["kl"] > 1e-4
    assert by_protocol["omitted"]["omitted_mean"] > 1e-3
    entry = next(e for e in document["omitted"] if e["keys"] == 384)
    assert [layer["layer"] for layer in entry["layers"]] == [0, 1]
    heads = [head["omitted_mean"] for layer in entry["layers"] for head in layer["heads"]]
    assert len(heads) == 8
    mean = by_protocol["omitted"]["omitted_mean"]
    assert sum(heads) / 8 == pytest.approx(mean)


def test_omitted_mass_has_an_interval_around_its_mean(evaluated):
    """512 rows of the last 300 of two documents are drawn."""
    _, document = evaluated
    small = next(e for e in document["records"] if (e["protocol"], e["keys"]) == ("omitted", 384))
    assert (small["documents"], small["tokens"]) == (2, 512)
    assert 0 <= small["omitted_low"] < small["omitted_mean"] < small["omitted_high"] <= 1
    assert small["omitted_high"] - small["omitted_mean"] < 0.05
    shown = readme_table.result(small)[0]
    assert f"(95 %: {small['omitted_low']:.3f} to {small['omitted_high']:.3f}), p99" in shown
    older = {k: v for k, v in small.items() if k not in ("omitted_low", "omitted_high")}
    assert readme_table.result(older)[0].startswith(f"mean {small['omitted_mean']:.3f}, p99")


def test_pictures_are_drawn(evaluated):
    output, _ = evaluated
    for name in ("quality", "omitted_mass", "support"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_is_one_file_with_pictures_and_every_figure(evaluated):
    output, document = evaluated
    text = (output / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'src="(.{22})', text) == ["data:image/png;base64,"] * 3
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    rows = re.findall(r"<tr[^>]*><td>(.*?)</td></tr>", text)
    shown = [re.sub("<[^>]*>", " ", row).split("  ") for row in rows]
    for name in dict.fromkeys(r["protocol"] for r in document["records"]):
        title, _, expected = report.cells(name, document["records"])
        assert f"<h2>{html.escape(title)}</h2>" in text
        assert all(row in shown for row in expected)
    assert text.count('class="dense"') == 4


def test_names_in_the_report_are_text():
    """A model's folder may be called anything."""
    document = {
        "settings": {"model": "<b>", "context": 1, "documents": 1, "dtype": "float32"},
        "environment": {}, "seconds": {}, "records": [],
    }  # fmt: skip
    assert "<b>" not in page.make(document, {})


def test_one_json_file_and_no_picture(folder, tmp_path, capsys):
    path = tmp_path / "deep" / "x.json"
    more = ("--budgets", "384", "--selectors", "exact", "--protocols", "prefill")
    assert cli.main(small(folder, path, *more)) == 0
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    assert "prefill through the policy" in capsys.readouterr().out


@pytest.fixture
def no_weights(monkeypatch):
    """Fails where weights are read."""

    def read(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", read)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--context", "9999"], r"--context 9999 exceeds the 4096 positions.*use 4096 or less"),
        (["--context", "4096"], r"--text .*none of its 2 documents has 4097 tokens"),
        (["--budgets", "400"], r"budget: 400 keys.*use 384 or 448"),
        (["--decode-tokens", "600"], r"--decode-tokens 600 leaves nothing of --context 600"),
        (["--model", "nowhere"], r"--model nowhere has no config.json: give a folder"),
        (["--text", "nowhere"], r"--text nowhere is no file"),
        (["--budgets", "300"], r"budget: 300 keys do not hold .* use at least 320"),
        (["--protocols", "decode", "needle"], r"--protocols needle is none: use .*needles"),
        (["--selectors", "quests"], r'model \(llama\): condensed_attention: selector is "quests"'),
        (["--top-p", "2"], r"model \(llama\): condensed_attention: top_p is 2"),
        (["--dtype", "int8"], r"--dtype int8 is none: use float32"),
    ],
)
def test_what_cannot_be_done_is_said(folder, tmp_path, capsys, request, more, said):
    if more != ["--context", "4096"]:  # that the text is short is known after it is tokenised
        request.getfixturevalue("no_weights")
    assert cli.main(small(folder, tmp_path, *more)) == 2
    assert re.search(said, capsys.readouterr().err)


def test_counts_are_at_least_one(folder, tmp_path, capsys):
    assert cli.main(small(folder, tmp_path, "--documents", "0")) == 2
    assert "--documents is 0: it must be at least 1" in capsys.readouterr().err


def test_a_window_fewer_than_asked_is_said(folder, tmp_path, capsys):
    more = ("--documents", "7", "--budgets", "640", "--protocols", "prefill")
    assert cli.main(small(folder, tmp_path / "x.json", *more)) == 0
    assert "2 texts (--text has no 7)" in capsys.readouterr().out


def test_an_interrupt_leaves_what_was_measured(folder, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(protocols, "decode", interrupted)
    more = ("--budgets", "640", "--protocols", "prefill", "decode", "needles")
    assert cli.main(small(folder, tmp_path, *more)) == 130
    said = capsys.readouterr()
    assert "interrupted; 1 of 3 protocols were measured" in said.err
    assert "prefill through the policy" in said.out
    document = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert {r["protocol"] for r in document["records"]} == {"prefill"}


def test_tables_fit_100_columns_and_progress_is_told(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(small(folder, tmp_path / "x.json", "--budgets", "384", "--top-p", "0.9")) == 0
    said = capsys.readouterr()
    assert "\N{HORIZONTAL ELLIPSIS}" not in said.out
    tables = said.out.partition("records:")[0]
    assert max(map(len, tables.splitlines())) <= 100
    words = tables.split()
    for _, _, columns in report.TABLES.values():
        assert {word for _, heading, _ in columns for word in heading.split()} <= set(words)
    assert {"block,", "0.9", "unfused", "48"} <= set(words)
    for name in evaluation.PROTOCOLS:
        assert f"evaluate: {name} 100 %" in said.err


@pytest.fixture(scope="module")
def loaded(folder):
    return subject.load(
        folder / "model", folder / "text.txt",
        context=CONTEXT, documents=2, batch=1, dtype="float32", device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("protocol", evaluation.PROTOCOLS)
def test_progress_adds_up_to_one(loaded, protocol):
    chosen = [policies.policy("block", keys) for keys in (384, 640)]
    shares = []
    run = {
        "decode": lambda: protocols.decode(loaded, chosen, 3, shares.append),
        "prefill": lambda: protocols.prefill(loaded, chosen, 3, shares.append),
        "needles": lambda: protocols.needles(loaded, chosen, 2, advance=shares.append),
        "survival": lambda: protocols.survive(loaded, chosen, 3, shares.append),
        "omitted": lambda: protocols.omitted(loaded, chosen, shares.append),
        "steps": lambda: protocols.steps(loaded, chosen, shares.append),
    }
    run[protocol]()
    assert sum(shares) == pytest.approx(1)
    assert len(shares) > 2


def test_every_protocol_is_dense_under_a_covering_budget(folder, device):
    on_device = subject.load(
        folder / "model", folder / "text.txt",
        context=CONTEXT, documents=2, batch=2, dtype="float32", device=device,
    )  # fmt: skip
    chosen = [policies.policy("block", 640)]
    decoded = protocols.decode(on_device, chosen, 3)
    prefilled = protocols.prefill(on_device, chosen, 3)
    assert [r["kl"] for r in (*decoded, *prefilled)] == pytest.approx([0] * 4, abs=1e-4)
    dense, ours = protocols.needles(on_device, chosen, 2)
    assert dense["needle_all"] == ours["needle_all"]
    assert [r["survived"] for r in protocols.survive(on_device, chosen, 3)] == [1, 1]
    ((omitted,), (audit,)) = protocols.omitted(on_device, chosen)
    assert omitted["omitted_max"] < 1e-4
    assert audit.omitted.device.type == "cpu"


def test_needles_of_every_document_are_counted(monkeypatch, loaded):
    asked = []

    def scripted(
        model, tokenizer, document, needles, variant, prompt_tokens, *, form, batch, advance
    ):
        asked.append((len(document), [n.words for n in needles], prompt_tokens, batch))
        right = (True, False) if variant is None else (False, False)
        return [Answer(first=True, whole=whole) for whole in right]

    monkeypatch.setattr(protocols, "ask_needles", scripted)
    records = protocols.needles(loaded, [policies.policy("block", 384)], 2)
    assert [(r["needle_first"], r["needle_all"]) for r in records] == [(1, 0.5), (1, 0)]
    assert [(r["documents"], r["tokens"]) for r in records] == [(2, 4)] * 2
    first, second = asked[:2]
    assert first[1] != second[1]  # other needles in another document
    # A whole number of tiles, so that the question stands in a full last tile.
    assert [entry[0::2] for entry in asked] == [(CONTEXT, 576)] * 4


def test_batches_are_the_beginnings_of_all_windows(loaded):
    three = replace(loaded, windows=[*loaded.windows, loaded.windows[0]], batch=2)
    batches = [batch.tolist() for batch in three.batches(5)]
    assert batches == [[w.ids[:5] for w in loaded.windows], [loaded.windows[0].ids[:5]]]
    assert three.batch_count == 2


def test_record_has_only_known_fields():
    empty = protocols.record("decode", None)
    assert [empty[name] for name in protocols.FIELDS] == [None] * len(protocols.FIELDS)
    with pytest.raises(ValueError, match=r"no .*klx"):
        protocols.record("decode", None, klx=1)


def test_variant_is_named_with_what_is_not_plain():
    plain = protocols.record("decode", policies.policy("block", 384, far_field=False))
    other = protocols.record("decode", policies.policy("block", 384, far_field=True, top_p=0.9))
    assert report.variant_name(plain) == "block"
    assert report.variant_name(other) == "block, far field, top-p 0.9"


# bench.fidelity.


def test_bench_covers_every_protocol_and_its_table_reads_them(folder, tmp_path, monkeypatch):
    """Budgets of the benchmark cover so short a context, so everything must be dense."""
    monkeypatch.setattr(fidelity, "SURVIVAL_TOKENS", 6)
    monkeypatch.setattr(fidelity, "GREEDY_TOKENS", 6)
    monkeypatch.setattr(fidelity, "QUESTIONS", 2)
    path = tmp_path / "fidelity.json"
    more = ("--context", str(CONTEXT), "--documents", "2", "--decode-tokens", "4")
    assert fidelity.main(arguments(folder, *more, "--output", str(path))) == 0
    document = json.loads(path.read_text(encoding="utf-8"))
    cases = [(r["protocol"], r["selector"], r["keys"]) for r in document["records"]]
    assert set(cases) == {
        *(("decode", "block", k) for k in (2048, 4096, 6144)), ("decode", "exact", 2048),
        ("steps", "block", 2048),
        *((name, "dense, unfused", None) for name in ("decode", "prefill", "survival")),
        ("needles", "dense", None), ("needles", "block", 1024), ("needles", "block", 2048),
        ("prefill", "block", 2048), ("omitted", "block", 2048), ("survival", "block", 4096),
        ("greedy, float32", "block", CONTEXT),
    }  # fmt: skip
    for r in document["records"]:
        assert r["kl"] is None or abs(r["kl"]) < 1e-5
        assert r["survived"] in (None, 1)
    greedy = document["records"][-1]
    assert (greedy["identical_tokens"], greedy["tokens"]) == (6, 6)
    shown = readme_table.fidelity_table(document)
    for words in (
        "all characters", "100 % identical to dense over 6 tokens", "6 of 6 tokens identical",
        "estimate off by 0.000",
    ):  # fmt: skip
        assert words in shown
    assert re.search(r"perplexity [+-]0\.0 % \(median text [+-]0\.0, worst [+-]0\.0\)", shown)


def test_bench_wants_all_its_documents(folder, tmp_path):
    chosen = fidelity.parse(arguments(folder, "--context", str(CONTEXT), "--documents", "3"))
    with pytest.raises(SystemExit, match="has 2 windows of 601 tokens, --documents 3 are asked"):
        fidelity.make_run(chosen)


# The trained model.


def test_trained_model_retrieves_and_keeps_its_distribution():
    model = SHARED / "models" / "tiny-code-lm"
    data = SHARED / "data" / "heldout_code.txt"
    if not (model / "model.safetensors").is_file() or not data.is_file():
        pytest.skip(f"no trained model and text in {SHARED}: set CONDENSATE_SHARED")
    trained = subject.load(
        model, data, context=1024, documents=1, batch=2, dtype="float32", device="cpu"
    )
    budget = policies.policy("block", 512, far_field=False, shortlist=256)
    blind = {**budget, "topk": 0}
    decoded = protocols.decode(trained, [budget, blind], 4)
    control, kept, blinded = (r["kl"] for r in decoded)
    assert abs(control) < 1e-5
    assert control < kept < blinded
    answered = [r["needle_all"] for r in protocols.needles(trained, [budget, blind], 2)]
    assert answered == [1, 1, 0]
