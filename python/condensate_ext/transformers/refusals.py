"""What cannot be computed right is refused, by model, layer, reason and way out."""

from __future__ import annotations

from typing import Any, NoReturn

import torch


def layer_name(module: torch.nn.Module) -> str:
    """``LlamaAttention of layer 3``."""
    index = getattr(module, "layer_idx", None)
    return type(module).__name__ + ("" if index is None else f" of layer {index}")


def refuse(what: str, instead: str, module: torch.nn.Module | None = None) -> NoReturn:
    """Raises what a forward pass of condensate attention raises where it cannot honour something.

    Raises:
        NotImplementedError: always.
    """
    where = "" if module is None else f" in {layer_name(module)}"
    raise NotImplementedError(f"condensate attention cannot honour {what}{where}; {instead}.")


def refusal_of(config: Any) -> str | None:
    """Why a model of this configuration cannot run through condensate attention, or None.

    Read before weights are loaded; what only a forward pass shows is refused there.

    Args:
        config: a transformers configuration.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    name = getattr(text, "model_type", type(text).__name__)
    if getattr(text, "is_encoder_decoder", False):
        return f"{name} has an encoder; use a decoder-only model."
    indexers = ("index_topk", "index_n_heads", "index_head_dim", "sparse_attention_config")
    if found := [field for field in indexers if getattr(text, field, None) is not None]:
        return f"{name} selects its keys itself ({found[0]}); run it as it is."
    for field in ("attn_logit_softcapping", "attention_logit_softcapping"):
        if getattr(text, field, None) is not None:
            return (
                f"{name} caps its scores ({field}={getattr(text, field)}), which prefill has no "
                "kernel for; run it as it is."
            )
    if getattr(text, "alibi", False):
        return f"{name} biases its scores by position (alibi); use a model with rotary positions."
    width = _head_dim(text)
    if width is not None and width > 256:
        return f"{name} has head_dim {width}; the kernels reach 256."
    return None


def _head_dim(text: Any) -> int | None:
    width = getattr(text, "head_dim", None)
    hidden, heads = (getattr(text, n, None) for n in ("hidden_size", "num_attention_heads"))
    if not isinstance(width, int) and isinstance(hidden, int) and isinstance(heads, int) and heads:
        width = hidden // heads
    return width if isinstance(width, int) else None
