"""How needles are asked for, and lm-eval's tasks through the hook."""

from __future__ import annotations

import json
import re

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from condensate_ext import cli, evaluate  # noqa: E402
from condensate_ext.evaluate import forms, needles, policies, protocols, report, tasks  # noqa: E402
from condensate_ext.evaluate.subject import Subject  # noqa: E402
from condensate_ext.evaluate.tasks import Scores  # noqa: E402

from tests.testkit import tiny_lm  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny_lm.make_tokenizer()
    made.chat_template = TEMPLATE
    return made


# name, chat: the prompt's end behind the document, the answer
ASKED = {
    ("question", False): ("\nQuestion: What is the secret code for {}? Answer:", " {}"),
    ("statement", False): ("\nThe secret code for {} is", " {}"),
    ("question", True): (
        "\nWhat is the secret code for {}? Answer with the code.[assistant]", "{}",
    ),
    ("statement", True): (
        "\nWhat is the secret code for {}? Answer with the code.[assistant]"
        "The secret code for {} is", " {}",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "chat"), ASKED)
def test_a_prompt_is_the_document_and_what_is_asked(tokenizer, name, chat):
    (needle,) = evaluate.make_needles(1)
    form = forms.make_form(name, tokenizer, chat)
    document = [tiny_lm.BEGIN, *[n % 90 for n in range(400)]]
    prompt = needles._prompt(tokenizer, document, needle, 300, form)
    asked, answer = ASKED[name, chat]
    end = asked.replace("{}", needle.words)
    begin = tokenizer.decode([tiny_lm.BEGIN]) if not chat else "[user] "
    text = tokenizer.decode(prompt.ids)
    assert text.startswith(begin) and text.endswith(end) and len(prompt.ids) == 300
    assert prompt.question == len(end)
    assert tokenizer.decode(prompt.expected) == answer.replace("{}", needle.code)
    filler = text.removeprefix(begin).removesuffix(end)
    assert filler == tokenizer.decode(document[1 : len(filler) + 1])


def test_the_statement_to_complete_is_the_one_that_was_hidden(tokenizer):
    (needle,) = evaluate.make_needles(1)
    form = forms.make_form("statement", tokenizer)
    assert needle.statement == f"{form.asked(needle)[1:]}{form.answer(needle)}.\n"


def test_forms_that_cannot_be_made_are_refused(tokenizer):
    with pytest.raises(ValueError, match="--needle-form riddle is none: use question or statement"):
        forms.make_form("riddle", tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        forms.make_form("question", tiny_lm.make_tokenizer(), chat=True)
    deaf = tiny_lm.make_tokenizer()
    deaf.chat_template = "hello"
    with pytest.raises(ValueError, match="drops what the user says"):
        forms.make_form("question", deaf, chat=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("tiny")
    tiny_lm.save(path, [tiny_lm.make_text(70, seed) for seed in range(2)])
    tokenizer.save_pretrained(path / "model")
    return path


@pytest.fixture(scope="module")
def ending(folder):
    """The same, whose tokenizer names a token that ends a text."""
    made = transformers.AutoTokenizer.from_pretrained(folder / "model")
    made.eos_token = "<s>"
    made.save_pretrained(folder / "model")
    return folder


def run(folder, output, *more):
    return cli.main([
        "evaluate", "--model", str(folder / "model"), "--text", str(folder / "text.txt"),
        "--device", "cpu", "--context", "600", "--documents", "1", "--budgets", "640",
        "--output", str(output), *more,
    ])  # fmt: skip


@pytest.mark.parametrize("more", [("--needle-form", "statement"), ("--chat",)])
def test_a_covering_budget_answers_as_dense_attention_in_every_form(folder, tmp_path, capsys, more):
    path = tmp_path / "x.json"
    assert run(folder, path, "--protocols", "needles", "--needles", "2", *more) == 0
    document = json.loads(path.read_text(encoding="utf-8"))
    dense, ours = document["records"]
    assert (dense["needle_first"], dense["needle_all"]) == (
        ours["needle_first"], ours["needle_all"],
    )  # fmt: skip
    assert document["settings"]["chat"] is ("--chat" in more)
    # A random model answers nothing, and is not blamed on the policy.
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "Dense attention itself answers 0 % of the needles" in said


def test_no_hint_where_dense_attention_answers():
    good = protocols.record("needles", None, needle_first=0.9)
    assert report.hints([good]) == [] and report.hints([]) == []


# lm-eval.


def test_tasks_have_a_record_a_policy_and_an_interval(monkeypatch):
    subject = Subject(None, None, [], 600, 1)
    chosen = policies.policy("block", 384)
    said = {"a": [0.0, 1.0, 1.0], "b": [1.0, 1.0, 1.0]}
    monkeypatch.setattr(
        tasks, "score",
        lambda subject, opened, variant, limit, chat: {n: Scores("m", said[n]) for n in opened},
    )  # fmt: skip
    shares = []
    records = tasks.run(subject, {"a": 1, "b": 2}, [chosen], 3, advance=shares.append)
    assert [(r["protocol"], r["keys"], r["documents"]) for r in records] == [
        ("task a", None, 3), ("task a", 384, 3), ("task b", None, 3), ("task b", 384, 3),
    ]  # fmt: skip
    assert sum(shares) == pytest.approx(1)
    assert records[0]["score"] == pytest.approx(2 / 3)
    half = 4.30265 / 3  # a standard error of sqrt(1/3) / sqrt(3)
    assert records[0]["score_high"] - records[0]["score"] == pytest.approx(half, rel=1e-4)
    (first, _) = [report.cells(name, records) for name in ("task a", "task b")]
    assert first[0] == "lm-eval's task a" and first[2][0][2] == "0.6667"


def test_scores_are_those_of_rulers_length_or_the_first_metric():
    ruler = [{"metrics": ["4096", "600"], "4096": -1.0, "600": s} for s in (0.5, 1.0)]
    other = [{"metrics": ["acc", "f1"], "acc": 1.0, "f1": 0.0}]
    results = {"samples": {"ruler_vt": ruler, "quiz": other}}
    assert tasks._scores(results, "ruler_vt", 600) == Scores("600", [0.5, 1.0])
    assert tasks._scores(results, "quiz", 600) == Scores("acc", [1.0])


def test_missing_lm_eval_is_said_before_anything_is_loaded(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert run(folder, tmp_path, "--tasks", "niah_single_1") == 1
    assert "pip install lm_eval" in capsys.readouterr().out


def test_tokenizers_without_an_end_are_refused():
    with pytest.raises(ValueError, match=r"no token that ends a text.*set its eos_token"):
        tasks.open_tasks(["niah_single_1"], tiny_lm.make_tokenizer(), 600)


@pytest.mark.slow
def test_a_generated_task_runs_and_is_dense_under_a_covering_budget(ending, tmp_path):
    pytest.importorskip("lm_eval")
    pytest.importorskip("wonderwords")
    more = ("--protocols", "prefill", "--decode-tokens", "2", "--task-limit", "2")
    path = tmp_path / "x.json"
    assert run(ending, path, *more, "--tasks", "niah_single_1") == 0
    records = [
        r for r in json.loads(path.read_text(encoding="utf-8"))["records"]
        if r["protocol"] == "task niah_single_1"
    ]  # fmt: skip
    assert [(r["selector"], r["documents"]) for r in records] == [("dense", 2), ("block", 2)]
    assert records[0]["score"] == records[1]["score"]


@pytest.mark.slow
def test_a_published_model_completes_statements(published_model):
    """Questions that it does not answer densely say nothing about a policy."""
    from condensate_ext.model_files import load_causal_lm

    loaded_tokenizer, model = load_causal_lm(published_model, torch.float32)
    text = "\n".join(f"Line {n} of a report about nothing in particular." for n in range(200))
    made = evaluate.make_needles(4)
    document = evaluate.hide_needles(loaded_tokenizer, text, made, 768, 768)
    form = forms.make_form("statement", loaded_tokenizer)
    answers = evaluate.ask_needles(
        model, loaded_tokenizer, document, made, None, 768, form=form, batch=4
    )
    assert sum(answer.first for answer in answers) >= 2
