"""Which layers the plugin condenses, leaves to vLLM, or refuses. Knows nothing of vLLM."""

from __future__ import annotations

from dataclasses import dataclass

from condensate_ext.kvcache import HEAD_DIMS

MAX_GROUP = 64


@dataclass(frozen=True)
class Layer:
    """What decides over an attention layer."""

    name: str
    head_dim: int
    group: int  # query heads a KV head
    page_size: int
    model_dtype: str
    cache_dtype: str  # "auto" for the model's
    attention_type: str = "decoder"
    sliding_window: bool = False
    alibi: bool = False
    softcap: bool = False
    sinks: bool = False
    shares_cache: bool = False


def unsupported(layer: Layer) -> str | None:
    """Why the layer cannot be condensed, or None."""
    page = layer.page_size
    reasons = {
        f"{layer.attention_type} attention, not a decoder's": layer.attention_type != "decoder",
        f"head_dim {layer.head_dim}, not one of {HEAD_DIMS}": layer.head_dim not in HEAD_DIMS,
        f"{layer.group} query heads a KV head, more than {MAX_GROUP}": layer.group > MAX_GROUP,
        f"a page size of {page}, not 32 or a multiple of 64 (--block-size)": page != 32
        and page % 64 != 0,
        f"a {layer.cache_dtype} cache (--kv-cache-dtype), not the model's {layer.model_dtype}":
            layer.cache_dtype not in ("auto", layer.model_dtype),
        "ALiBi": layer.alibi,
        "soft-capped scores": layer.softcap,
        "attention sinks": layer.sinks,
        "another layer's cache": layer.shares_cache,
    }  # fmt: skip
    return next((reason for reason, holds in reasons.items() if holds), None)


def refusal(layer: Layer, reason: str) -> str:
    """The message, with the option that turns the plugin off for the layer."""
    return (
        f"condensate_ext: layer {layer.name} has {reason}; leave it to vLLM's own attention with "
        f"CONDENSATE_VLLM_SKIP_LAYERS={layer.name}, or unset CONDENSATE_VLLM."
    )
