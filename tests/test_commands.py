"""`condensate bench` and `generate`, and what every command shares."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import pytest

transformers = pytest.importorskip("transformers", minversion="5.0")

from condensate_ext import cli  # noqa: E402
from condensate_ext.commands import bench_cases, console, generate  # noqa: E402

from tests.testkit import tiny_lm  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, _ = tiny_lm.save(tmp_path_factory.mktemp("tiny"), [""])
    return str(folder)


def test_options_take_several_values_and_the_module_runs():
    spread = cli._spread(["evaluate", "--budgets", "1", "2", "--model", "m", "--tasks", "a"])
    assert spread == [
        "evaluate", "--budgets", "1", "--budgets", "2", "--model", "m", "--tasks", "a",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "condensate_ext", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for name in ("doctor", "bench", "evaluate", "calibrate", "generate", "demo"):
        assert re.search(rf"^  {name} .*\w\.$", done.stdout, flags=re.MULTILINE)


def test_importing_the_package_loads_no_command():
    code = "import sys, condensate_ext; assert not {'typer', 'rich'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    now = iter([0, 5, 12, 13, 40])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    file = io.StringIO()
    advance = console.Lines("evaluate", file, every=10).task("decode")
    for _ in range(4):
        advance(0.25)
    assert file.getvalue().splitlines() == [
        "evaluate: decode 50 %, 12 s, about 12 s left", "evaluate: decode 100 %, 40 s",
    ]  # fmt: skip


# generate.


def generated(capsys, model, *more, prompt="Once upon a time " * 40):
    status = cli.main(
        ["generate", "--model", model, "--device", "cpu", "--prompt", prompt, "--new-tokens", "8",
         *more]
    )  # fmt: skip
    said = capsys.readouterr()
    return status, said.out, said.err


def test_a_covering_budget_generates_the_dense_text(capsys, model):
    status, out, _ = generated(capsys, model, "--budget", "1024")
    assert status == 0
    assert re.search(r"all \d tokens are identical", out)
    assert "The budget covers prompt and answer" in out
    assert re.search(r"^dense +\d ", out, flags=re.MULTILINE) and "tokens/s" in out


def test_a_small_budget_shows_where_it_differs(capsys, model):
    status, out, _ = generated(capsys, model, "--budget", "320", "--new-tokens", "32")
    assert status == 0 and "block, 320 keys" in out
    found = re.search(r"the first (\d+) tokens are identical, token (\d+) differs", out)
    assert found and int(found[2]) == int(found[1]) + 1
    assert "covers" not in out


def test_the_first_difference_counts_ends_too():
    runs = [generate.Run(tokens, 1.0, 1.0) for tokens in ([5, 6, 7], [5, 6, 7], [5, 6], [5, 9, 7])]
    said = [generate._first_difference(runs[0], run) for run in runs[1:]]
    assert [s.split(",")[0] for s in said] == [
        "all 3 tokens are identical", "the first 2 tokens are identical",
        "the first 1 tokens are identical",
    ]  # fmt: skip
    assert runs[0].tokens_per_second == 2


def test_a_chat_template_puts_the_prompt_into_a_turn():
    tokenizer = tiny_lm.make_tokenizer()
    with pytest.raises(ValueError, match="no chat template"):
        generate.prompt_ids(tokenizer, "Hi", chat=True)
    turn = "[{{ m['role'] }}: {{ m['content'] }}]"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    ids = generate.prompt_ids(tokenizer, "Hi", chat=True)
    assert tokenizer.decode(ids[0]) == "[user: Hi]"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--budget", "300"], "300 keys do not hold"),
        (["--selector", "best"], 'selector is "best"'),
        (["--new-tokens", "0"], "--new-tokens is 0"),
        (["--new-tokens", "4000"], "more than the 4096 positions"),
        (["--chat"], "no chat template"),
        (["--prompt-file", "x"], "one of them"),
        (["--dtype", "int4"], "--dtype int4 is none"),
    ],
)
def test_generate_refuses(capsys, model, more, said):
    status, _, err = generated(capsys, model, *more)
    assert status == 2 and said in err and err.startswith("condensate generate: ")


# bench.


def test_bench_times_writes_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["--lengths", "512", "1024", "--budgets", "384", "--heads", "2", "--head-dim", "64"]
    assert cli.main(["bench", *arguments, "--device", "cpu", "--output", str(tmp_path)]) == 0
    records = json.loads((tmp_path / "bench.json").read_text())["records"]
    assert [(r["what"], r["tokens"], r["budget"]) for r in records] == [
        (what, tokens, 384) for what in ("prefill", "decode") for tokens in (512, 1024)
    ]
    for r in records:
        assert r["speedup"] == pytest.approx(r["dense_ms"] / r["ms"]) and r["ms"] > 0
        assert r["dense_kernel"] == "flash"
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr()
    assert said.out.count("384 keys: ") == 2 and "bench: decode 100 %" in said.err


def test_bench_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    sound = bench_cases.prefill

    def interrupted(shape, tokens, budgets):
        if tokens == 512:
            raise KeyboardInterrupt
        return sound(shape, tokens, budgets)

    monkeypatch.setattr(bench_cases, "prefill", interrupted)
    arguments = ["--lengths", "448", "512", "--budgets", "384", "--heads", "2", "--head-dim", "64"]
    assert cli.main(["bench", *arguments, "--device", "cpu", "--output", str(tmp_path)]) == 130
    assert len(json.loads((tmp_path / "bench.json").read_text())["records"]) == 1
    said = capsys.readouterr()
    assert "1 records are in" in said.err and "448" in said.out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--head-dim", "20"], "20"),
        (["--budgets", "1000"], "use 960 or 1024"),
        (["--lengths", "0"], "--lengths 0"),
        (["--dtype", "int8"], "--dtype int8"),
    ],
)
def test_bench_refuses_before_it_times(tmp_path, capsys, more, said):
    assert cli.main(["bench", "--device", "cpu", "--output", str(tmp_path / "x"), *more]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("speedups", "said"),
    [
        ([0.5, 1.5, 2], "break-even between 1 and 2 tokens"),
        ([1.5, 0.5, 2], "break-even between 2 and 3 tokens"),
        ([2, 3, 4], "faster at every length measured, from 1 tokens on"),
        ([0.1, 0.2, 0.3], "dense attention is faster at every length measured"),
        ([0.1, 2, 0.3], "dense attention is faster at 3 tokens, too"),
    ],
)
def test_break_even(speedups, said):
    records = [
        {"what": "prefill", "budget": 9, "tokens": n + 1, "speedup": s}
        for n, s in enumerate(speedups)
    ]
    assert bench_cases.break_even(records, "prefill", 9).endswith(said)
