"""bench.generation, on a small random model."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers", minversion="5.0")

from bench import generation, report
from tests.testkit import tiny_lm


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    return tmp_path


def test_a_run_writes_a_record_a_way(folder):
    model, text = tiny_lm.save(folder, [tiny_lm.make_text(60)])
    arguments = ["--tokens", "300", "--new", "6", "--rounds", "1", "--topk", "256"]
    assert generation.main([str(model), str(text), *arguments, "--dtype", "float32"]) == 0
    written = json.loads((report.results_folder() / "generation.json").read_text())
    records = {record["way"]: record for record in written["records"]}
    assert list(records) == list(generation.WAYS)
    assert all(record["same_tokens"] == 6 for record in records.values())  # the budget covers all
    assert records["lossless"]["accepted_per_round"] > 0


def test_a_random_model_of_a_shape(folder, monkeypatch):
    small = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    monkeypatch.setitem(generation.SHAPES, "llama3-8b", {**small, "vocab_size": 97})
    arguments = ["--shape", "llama3-8b", "--layers", "1", "--tokens", "200", "--new", "4"]
    assert generation.main([*arguments, "--rounds", "1", "--dtype", "float32"]) == 0


def test_how_many_tokens_are_the_same():
    assert generation.common([1, 2, 3], [1, 2, 4]) == 2
    assert generation.common([1, 2], [1, 2, 4]) == 2
    assert generation.common([0], [1]) == 0


def test_what_to_run_has_to_be_said(folder):
    for arguments in ([], ["folder"], ["folder", "text", "--shape", "llama3-8b"]):
        with pytest.raises(SystemExit):
            generation.main(arguments)
