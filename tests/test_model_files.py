"""Models that somebody else made are opened without running anything of theirs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from condensate_ext.model_files import load_causal_lm  # noqa: E402


class _Harm:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def _tiny(folder: Path) -> dict:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {chr(97 + i): i for i in range(26)} | {"<unk>": 26}
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
            }
        )
    )
    return json.loads((folder / "config.json").read_text())


def test_safetensors_are_opened(tmp_path):
    _tiny(tmp_path)
    tokenizer, model = load_causal_lm(tmp_path, torch.float32)
    assert tokenizer("a").input_ids == [0] and not model.training


def test_pickles_are_not(tmp_path):
    _tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    harmed = tmp_path / "harmed"
    torch.save({"lm_head.weight": _Harm(harmed)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no \*\.safetensors, expected .* save_pretrained"):
        load_causal_lm(tmp_path, torch.float32)
    assert not harmed.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert harmed.exists(), "it would have run"


def test_code_of_the_model_is_not_run(tmp_path):
    config = _tiny(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "theirs.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    config |= {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_causal_lm(tmp_path, torch.float32)
    assert not ran.exists()


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"--model .* has no config\.json"):
        load_causal_lm(tmp_path, torch.float32)
