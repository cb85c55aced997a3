"""What would fail later is refused from the configuration alone."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from condensate_ext import model_checks  # noqa: E402

SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 2048,
}  # fmt: skip
POLICY = {"window": 256, "anchors": 64, "topk": 704}


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of a configuration whose weights cannot be read."""

    def make(name, **values):
        config = transformers.AutoConfig.for_model(name, **{**SMALL, **values})
        config.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").write_bytes(b"no weights")
        return tmp_path / name

    return make


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "olmo2", "gpt_neox", "mixtral"])
def test_models_of_full_attention_pass(folder, name):
    model_checks.check_model(folder(name, sliding_window=None), [POLICY], crops=True)


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("gemma3_text", {}, r"gemma3_text \(gemma3_text\): 3 of 3 layers.*'sliding_attention'"),
        ("mistral", {"sliding_window": 512}, r"mistral .* sliding"),
        ("llama", {"head_dim": 320}, r"llama \(llama\): .* head_dim 320; the kernels reach 256"),
        ("bloom", {"n_head": 4}, r"bloom .*(AttentionInterface|attention)"),
        ("mamba", {}, r"mamba"),
    ],
)
def test_other_models_are_refused(folder, name, values, said):
    with pytest.raises(ValueError, match=said):
        model_checks.check_model(folder(name, **values), [POLICY], crops=True)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"topk": 700}, "topk is 700.*pass 640 or 704"),
        ({"selector": "blocks"}, 'selector is "blocks"'),
        ({"windows": 4}, "windows"),
        ({"window": -1}, "window is -1"),
        ({"scale": 2.0}, "scale"),
    ],
)
def test_policies_are_refused(folder, policy, said):
    with pytest.raises(ValueError, match=said):
        model_checks.check_model(folder("llama"), [POLICY, {**POLICY, **policy}])


def test_only_refusals_of_the_package_count(folder, monkeypatch):
    """A model that needs data cannot be tried without any; that says nothing about it."""

    def needs_data(*_, **__):
        return torch.ones(1, device="meta").item()

    path = folder("llama")
    monkeypatch.setattr(transformers.LlamaModel, "forward", needs_data)
    model_checks.check_model(path, [POLICY])
