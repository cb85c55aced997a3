"""Whether a model folder runs under a policy, told from its configuration before any weight is
read: the model is built on the meta device, where tensors have no data, and run through the hook.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from condensate_ext.model_files import check_folder

_FULL = "full_attention"
_REFUSED = (ValueError, TypeError, NotImplementedError, RuntimeError)


def check_model(
    folder: Path,
    policies: Sequence[dict[str, Any]],
    *,
    tokens: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    crops: bool = False,
    option: str = "--model",
) -> Any:
    """Refuses what would fail later, and returns the model's configuration.

    Args:
        folder: of a Hugging Face causal LM.
        policies: keyword arguments of ``condensed_attention``.
        tokens: length of the prompt; default: 4,096 or what the model has positions for.
        dtype: of weights and activations.
        crops: will the cache be cut back after a pass, as evaluations do? Only caches of full
            attention can.
        option: what messages call the folder.

    Raises:
        ValueError: the folder holds no model that can be opened, has layers that cannot be
            condensed, or a policy's name or value is none that its attention takes.
    """
    from condensate_ext.transformers import refusal_of

    config = read_config(folder, option)
    name = f"{folder.name} ({config.model_type})"
    if reason := refusal_of(config):
        raise ValueError(f"{name}: {reason}")
    text = config.get_text_config()
    _check_layers(name, text, crops)
    limit = getattr(text, "max_position_embeddings", None) or 4096
    length = min(4096, limit) if tokens is None else tokens
    model = _without_data(name, config, dtype) if policies else None
    for policy in policies:
        _try(name, model, policy, length)
    return config


def read_config(folder: Path, option: str = "--model") -> Any:
    """The configuration of a folder whose weights could be opened; raises ValueError."""
    from transformers import AutoConfig

    check_folder(folder, option)
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _check_layers(name: str, text: Any, crops: bool) -> None:
    kinds = getattr(text, "layer_types", None) or []
    window = getattr(text, "sliding_window", None)
    if crops and not kinds and window:
        raise ValueError(
            f"{name}: every layer has a sliding window of {window} tokens, whose cache cannot be "
            "cut back to compare policies on the same context; use a model of full attention, or "
            "`condensate generate`."
        )
    others = [n for n, kind in enumerate(kinds) if kind != _FULL]
    if crops and others:
        raise ValueError(
            f"{name}: {len(others)} of {len(kinds)} layers, layer {others[0]} first, are "
            f"'{kinds[others[0]]}', whose state cannot be cut back to compare policies on the same "
            "context; use a model of full attention, or `condensate generate`."
        )


def _without_data(name: str, config: Any, dtype: torch.dtype) -> Any:
    """The model on the meta device."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    make: Any = AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"), no_init_weights():
            return make(config, dtype=dtype, attn_implementation="sdpa").eval()
    except ValueError as error:
        raise ValueError(
            f"{name}: transformers cannot build it with replaceable attention "
            f"({str(error).split('. ')[0]}); use a model that has transformers' AttentionInterface."
        ) from error


def _try(name: str, model: Any, policy: dict[str, Any], tokens: int) -> None:
    """One pass; only what this package refuses counts, as models may need data of their own."""
    from condensate_ext.evaluate.runs import feed, new_cache
    from condensate_ext.transformers import condensed_attention

    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad(), condensed_attention(model, **policy):
            # Without a cache transformers looks for packed sequences in positions, which have none.
            feed(model.base_model, ids, new_cache(model))
    except _REFUSED as error:
        if _is_ours(error):
            raise ValueError(f"{name}: {error}") from error


def _is_ours(error: Exception) -> bool:
    """Did this package raise it, rather than something that needs data, which meta has not?"""
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(innermost).is_relative_to(Path(__file__).parent) and "meta tensor" not in str(error)
