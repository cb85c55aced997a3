"""vLLM's engine on the CPU, with the plugin and without it: `bash tools/test_vllm.sh`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from condensate_ext import vllm as plugin

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        plugin.why_inert({"CONDENSATE_VLLM": "1"}) is not None,
        reason=f"{plugin.why_inert({'CONDENSATE_VLLM': '1'})}; run tools/test_vllm.sh",
    ),
]
SCENARIOS = ("whole_prompts", "chunks", "prefix", "preemption")
COVERS = {"SHORTLIST": "1024", "PREFILL_TOPK": "1024"}
SMALL = {"WINDOW": "64", "ANCHORS": "16", "TOPK": "64", "SHORTLIST": "128", "PREFILL_TOPK": "64"}


def make_model(folder: Path, **changes: object) -> Path:
    """A random Llama whose attention matters to its logits."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=97, hidden_size=256, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=1024,
        initializer_range=0.3,
    )  # fmt: skip
    config = transformers.LlamaConfig(**{**sizes, **changes})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def start(model: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {
        **{k: v for k, v in os.environ.items() if not k.startswith("CONDENSATE_VLLM")},
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", **environment,
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__).with_name("engine_run.py")), str(model), str(out)]
    return subprocess.run(
        command, env=variables, capture_output=True, text=True, check=False, timeout=900
    )


def outputs(model: Path, out: Path, **environment: str) -> dict[str, dict[str, list[object]]]:
    done = start(model, out, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(out.read_text(encoding="utf-8"))
    found["log"] = done.stdout + done.stderr
    return found


def with_plugin(settings: dict[str, str]) -> dict[str, str]:
    return {"CONDENSATE_VLLM": "1", **{f"CONDENSATE_VLLM_{k}": v for k, v in settings.items()}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dense(model, tmp_path_factory):
    return outputs(model, tmp_path_factory.mktemp("dense") / "out.json")


@pytest.fixture(scope="module")
def covered(model, tmp_path_factory):
    return outputs(model, tmp_path_factory.mktemp("on") / "out.json", **with_plugin(COVERS))


@pytest.fixture(scope="module")
def condensed(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "out.json"
    return outputs(model, path, CHECK="1", **with_plugin(SMALL))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_tokens_are_those_of_vllm_where_the_budget_covers_the_context(dense, covered, scenario):
    assert covered[scenario]["tokens"] == dense[scenario]["tokens"]


@pytest.mark.parametrize("runs", ["dense", "covered", "condensed"])
def test_the_scenarios_are_what_their_names_say(request, runs):
    found = request.getfixturevalue(runs)
    assert found["preemption"]["preemptions"] > 0
    assert found["prefix"]["cached"][-1] == 640
    assert found["whole_prompts"]["cached"][-1] == 0


def test_the_log_says_what_each_layer_does(dense, covered):
    assert "2 layers condensed: model.layers.0.self_attn.attn" in covered["log"]
    assert "on, Settings(window=256, anchors=64, topk=704, shortlist=1024" in covered["log"]
    assert "layers condensed" not in dense["log"]


def test_a_budget_attends_what_the_ops_attend(dense, condensed):
    """Every layer of every batch against the ops over a contiguous copy of the cache."""
    seen = condensed["seen"]
    assert seen["selected_steps"] > 100 and seen["difference"] < 2e-5, seen
    assert condensed["chunks"]["tokens"] != dense["chunks"]["tokens"], "the budget matters"


def test_a_skipped_layer_is_vllms_own(model, dense, tmp_path):
    settings = with_plugin({**SMALL, "SKIP_LAYERS": "0,1"})
    found = outputs(model, tmp_path / "out.json", **settings)
    assert "2 layers vLLM's own attention (skipped)" in found["log"]
    assert all(found[s]["tokens"] == dense[s]["tokens"] for s in SCENARIOS)


def test_an_unsupported_layer_is_refused_at_the_start(tmp_path):
    model = make_model(tmp_path / "model", head_dim=32)
    done = start(model, tmp_path / "out.json", **with_plugin({}))
    assert done.returncode != 0
    log = done.stdout + done.stderr
    assert "layer model.layers.0.self_attn.attn has head_dim 32" in log
    assert "CONDENSATE_VLLM_SKIP_LAYERS=model.layers.0.self_attn.attn" in log
