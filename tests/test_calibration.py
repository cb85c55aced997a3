"""Budgets by layer and head."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from condensate_ext import cli, evaluate  # noqa: E402
from condensate_ext.evaluate import calibration  # noqa: E402
from condensate_ext.transformers import condensed_attention  # noqa: E402

from tests.testkit import tiny_lm  # noqa: E402

POLICIES = [evaluate.policy("block", keys) for keys in (384, 512, 1024)]


def test_each_head_gets_the_smallest_budget_that_does():
    masses = torch.tensor([[[0.3, 0.05]], [[0.1, 0.02]], [[0.05, 0.01]]])
    assert calibration.choose(masses, POLICIES, 0.1)["layers"] == {"0": [192, 64]}
    assert calibration.choose(masses, POLICIES, 0.07)["layers"] == {"0": [704, 64]}
    strict = calibration.choose(masses, POLICIES, 0.02)
    assert (strict["layers"], strict["missed"]) == ({"0": [704, 192]}, 1)


@torch.no_grad()
def test_a_calibrated_model_leaves_out_no_more_than_was_asked_for(tmp_path):
    model, text = tiny_lm.save(tmp_path, [tiny_lm.make_text(70, seed) for seed in range(2)])
    output = tmp_path / "budgets.json"
    arguments = [
        "calibrate", "--model", str(model), "--text", str(text), "--device", "cpu",
        "--context", "700", "--budgets", "384", "512", "1024", "--output", str(output),
    ]  # fmt: skip
    assert cli.main([*arguments, "--target", "1"]) == 0
    smallest = evaluate.load_layers(output)
    assert [layer["topk_per_head"].tolist() for layer in smallest.values()] == [[64, 64]] * 2
    assert cli.main([*arguments, "--target", "0"]) == 0
    largest = evaluate.load_layers(output)
    assert set(largest) == {0, 1} and all(layer["topk"] == 704 for layer in largest.values())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    ids = torch.randint(90, (1, 700), generator=torch.Generator().manual_seed(0))
    dense = loaded(input_ids=ids).logits
    with condensed_attention(loaded, topk=64, layers=largest):
        torch.testing.assert_close(loaded(input_ids=ids).logits, dense, atol=2e-4, rtol=2e-4)
    with condensed_attention(loaded, topk=64, layers=smallest):
        assert not torch.allclose(loaded(input_ids=ids).logits, dense, atol=1e-2)


def test_what_is_no_calibration_is_said(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"records": []}))
    with pytest.raises(ValueError, match="holds no budgets by layer"):
        evaluate.load_layers(path)
    assert cli.main(["calibrate", "--model", "m", "--text", "t", "--target", "2"]) == 2
    assert "--target is 2" in capsys.readouterr().err
