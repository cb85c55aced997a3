"""The scorecard's own faults: an oracle that sees nothing, a crash or a row that is lost."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import condensate_ext
import pytest
import torch

from tests.test_torch_integration import OPS as REGISTERED
from tools.scorecard import __main__ as command
from tools.scorecard import worker
from tools.scorecard.calls import OPS
from tools.scorecard.line import Line, Piece, Tally
from tools.scorecard.rows import LINES, bad_calls, hostile, oracle, repeatable, soak


def test_every_op_is_in_its_table():
    assert {op.name for op in OPS} == set(REGISTERED)
    assert len({line.name for line in LINES}) == len(LINES)


def _second(result: tuple, changed: Callable) -> tuple:
    return (result[0], changed(result[1]), *result[2:])


CHANGES = {
    "a key is lost": ("block_sparse_attention", lambda r: (r[0] * 1.001, r[1])),
    "the log-sum-exp is off": (
        "block_sparse_attention",
        lambda r: _second(r, lambda lse: lse + 1e-3),
    ),
    "a list is short": ("select_blocks", lambda r: (r[0].fill_(-1), r[1].fill_(0))),
    "a summary is off": ("block_summaries", lambda r: r * 1.01),
    "an estimate is off": ("attention_forward", lambda r: (r[0], r[1], r[2] * 0.9)),
    "the whole call is off": ("attention_forward", lambda r: (r[0] * 1.01, *r[1:])),
}


class _Changed:
    """The package, one function of which lies."""

    def __init__(self, name: str, change: Callable) -> None:
        self.name, self.change = name, change

    def __getattr__(self, name: str) -> object:
        function = getattr(condensate_ext, name)
        if name != self.name:
            return function
        return lambda *args, **options: self.change(function(*args, **options))


@pytest.mark.parametrize("fault", CHANGES)
@pytest.mark.parametrize("query_len", [1, 70])
def test_the_oracle_sees(monkeypatch, fault, query_len):
    call = oracle.Call(
        seed=1, device="cpu", dtype=torch.float32, batch=1, kv_heads=2, group=2,
        query_len=query_len, kv_len=700, head_dim=32, window=17, anchors=5, topk=128, causal=True,
        far_field=True, selector="block", top_p=None, per_head=None, scale=0.2,
    )  # fmt: skip
    assert oracle.BlockCheck(call).run() == ""
    monkeypatch.setattr(oracle, "ops", _Changed(*CHANGES[fault]))
    assert oracle.BlockCheck(call).run()


def test_the_oracle_sees_wrong_tokens(monkeypatch):
    call = oracle.draw(random.Random(3), "cpu")
    while call.selector != "exact" or call.topk < 7 or call.kv_len < 200 or call.query_len < 7:
        call = oracle.draw(random.Random(call.seed), "cpu")
    assert oracle.check_exact(call) == ""
    fewer = _Changed("attention_forward", lambda r: (r[0].roll(1, 2), *r[1:]))
    monkeypatch.setattr(oracle, "ops", fewer)
    assert "exact: output" in oracle.check_exact(call)


def test_lines_count_failures(monkeypatch):
    """Faults of an op show in the lines that go over it."""
    piece = Piece("cpu", "reduced", 0, 5)

    class Wrong:
        name, selectors, calls = "attention", (), 0
        make = staticmethod(OPS[0].make)

        def __call__(self, arguments: dict) -> tuple:
            self.calls += 1
            return tuple(t + 1e-6 * self.calls for t in OPS[0](arguments))

    monkeypatch.setattr(repeatable, "OPS", (Wrong(),))
    assert repeatable.run_launches(piece).failed > 0

    class Silent(Wrong):
        def __call__(self, arguments: dict) -> tuple:
            return ()

    monkeypatch.setattr(bad_calls, "OPS", (Silent(),))
    tally = bad_calls.run(piece)
    assert tally.failed == tally.count == tally.extra["silent"] > 50
    monkeypatch.setattr(condensate_ext, "read_error_word", lambda *_: condensate_ext.ErrorWord(0))
    assert any("not told" in words for words in hostile.run(piece).failures)
    monkeypatch.undo()
    condensate_ext.read_error_word("cpu")


def test_an_exception_is_a_failure():
    def broken(_: Piece) -> Tally:
        raise RuntimeError("out of order")

    line = Line("broken", "calls", "0", {"reduced": 1, "full": 1}, broken)
    tally = worker.run_piece(line, Piece("cpu", "reduced", 0, 0))
    assert (tally.count, tally.failed) == (1, 1) and "out of order" in tally.failures[0]


def test_work_is_kept_and_reported(tmp_path, monkeypatch, capsys):
    options = ["--only", "errors raised", "--state", str(tmp_path), "--commit", "here"]
    options += ["--docs", str(tmp_path / "docs")]
    assert command.main(options) == 0
    first = capsys.readouterr().out
    assert "10,000 errors: 0 failed" in first
    monkeypatch.setattr(command.subprocess, "run", None)  # nothing is left to run
    assert command.main(options) == 0
    assert capsys.readouterr().out == first
    report = json.loads((tmp_path / "docs" / "reliability.json").read_text())["rows"]
    assert [row["line"] for row in report] == ["errors raised"]
    assert {"count", "failed", "date", "commit", "card", "seed"} <= set(report[0])
    assert "| errors raised |" in (tmp_path / "docs" / "reliability.md").read_text()


def test_a_process_that_dies_is_a_failure(tmp_path, monkeypatch):
    line = next(line for line in LINES if line.name == "errors raised")
    options = command.parse(["--state", str(tmp_path), "--commit", "here"])
    dead = command.subprocess.CompletedProcess([], -11, "", "")
    monkeypatch.setattr(command.subprocess, "run", lambda *_, **__: dead)
    state = command.work_on(line, options, command.time.monotonic() + 60)
    assert state.failed == 1 and "-11" in state.failures[0] and state.is_done(line)


def test_a_leak_is_seen():
    kept: list[bytearray] = []
    assert soak._grown("cpu", lambda: kept.append(bytearray(2000)), 10_000) > soak._limit(10_000)
    assert soak._grown("cpu", lambda: None, 10_000) < soak._limit(10_000)


def test_unknown_lines_are_refused():
    with pytest.raises(SystemExit, match="no line is called"):
        command.main(["--only", "luck"])
