"""Families of models, each small and random, through the tool that tries all of them."""

from __future__ import annotations

import warnings

import pytest

transformers = pytest.importorskip("transformers", minversion="5.0")

from tools import compatibility  # noqa: E402

SEED_FAMILIES = ["gpt2", "gpt_neox", "qwen2", "llama", "mistral"]
# Windows, sinks, chunks, latent attention, values of other keys than the cached ones.
OTHERS = [
    "gemma3_text", "gpt_oss", "llama4_text", "cohere2", "olmo3", "phi3", "exaone4", "deepseek_v3",
    "diffllama", "opt",
]  # fmt: skip


@pytest.mark.parametrize("name", [*SEED_FAMILIES, *OTHERS])
def test_a_covering_budget_gives_the_dense_model(name):
    if name not in compatibility.NAMES:
        pytest.skip(f"this transformers has no {name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = compatibility.try_model(name)
    assert result.outcome == "identical", result


@pytest.mark.parametrize(
    ("name", "why"),
    [("gemma2", "caps its scores"), ("deepseek_v32", "selects its keys itself")],
)
def test_what_is_refused_says_why(name, why):
    if name not in compatibility.NAMES:
        pytest.skip(f"this transformers has no {name}")
    result = compatibility.try_model(name)
    assert result.outcome == "refused" and why in result.detail, result


def test_the_tool_finds_a_wrong_model(monkeypatch):
    """Attention that forgets a window is not the dense model."""
    from condensate_ext.transformers import attend

    original = attend.sparse

    def blind(given, *, window, **policy):
        return original(given, window=window // 2, **policy)

    monkeypatch.setattr(attend, "sparse", blind)
    assert compatibility.try_model("gemma3_text").outcome == "WRONG"
