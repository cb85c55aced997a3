"""vLLM's attention on the CPU, with layers of full attention condensed.

Everything that a layer does not condense is vLLM's own, called through its base class. Both find
their cache in the same memory: :func:`condensate_ext.vllm.cache.carve`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from condensate_ext.vllm import logger
from condensate_ext.vllm.cache import LayerCache, Rows, carve, plan_rows, record_bytes_per_token
from condensate_ext.vllm.settings import Settings
from condensate_ext.vllm.support import Layer, refusal, unsupported


class CondensateBackend(CPUAttentionBackend):  # type: ignore[misc]
    """Takes the place of ``CPU_ATTN``."""

    @staticmethod
    def get_impl_cls() -> type[CondensateImpl]:
        return CondensateImpl

    @staticmethod
    def get_builder_cls() -> type[CondensateMetadataBuilder]:
        return CondensateMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Makes a page larger by its record, so that vLLM's accounting of memory has it."""
        element = spec.dtype.itemsize
        record = record_bytes_per_token(spec.block_size, spec.head_size, element)
        return replace(spec, state_content_bytes=2 * spec.head_size * element + record)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False  # records are not inside the pages that a connector copies


@dataclass
class CondensateMetadata(CPUAttentionMetadata):  # type: ignore[misc]
    """vLLM's metadata and the runs of a batch."""

    runs: list[Rows] | None = None


class CondensateMetadataBuilder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """Builds :class:`CondensateMetadata`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> CondensateMetadata:
        common = common_attn_metadata
        dense = super().build(common_prefix_len, common, fast_build)
        query_lens = common.query_start_loc_cpu.diff().tolist()[: common.num_reqs]
        lengths = common.seq_lens.tolist()[: common.num_reqs]
        values = {f.name: getattr(dense, f.name) for f in fields(dense)}
        return CondensateMetadata(**values, runs=plan_rows(query_lens, lengths))


class CondensateImpl(CPUAttentionBackendImpl):  # type: ignore[misc]
    """A layer: condensed, or vLLM's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.vllm_config: VllmConfig = get_current_vllm_config()
        self.condensed: bool | None = None  # until decide_layers
        self.settings = Settings.from_environment(os.environ)
        self._cache: LayerCache | None = None
        self._pointer = 0

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        if self.condensed is None:
            decide_layers(self.vllm_config, act_dtype, self.settings)

    def _layer_cache(self, kv_cache: Tensor) -> LayerCache:
        if self._cache is None or self._pointer != kv_cache.data_ptr():
            self._cache = LayerCache.of(kv_cache, self.head_size)
            self._pointer = kv_cache.data_ptr()
        return self._cache

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if self.condensed:
            self._layer_cache(kv_cache).write(key, value, slot_mapping)
        elif kv_cache.numel():
            both, _ = carve(kv_cache, self.head_size)
            super().do_kv_cache_update(layer, key, value, both, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CondensateMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None or not self.condensed:
            if kv_cache.numel():
                kv_cache, _ = carve(kv_cache, self.head_size)
            dense: Tensor = super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
                output_block_scale,
            )  # fmt: skip
            return dense
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("condensate_ext: vLLM asks for a quantised output; unset it.")
        if attn_metadata.causal is not True or attn_metadata.dynamic_causal is not None:
            raise NotImplementedError(
                "condensate_ext: vLLM asks for attention that is not causal; unset CONDENSATE_VLLM."
            )
        assert attn_metadata.runs is not None
        tokens = attn_metadata.num_actual_tokens
        self._layer_cache(kv_cache).attend(
            query[:tokens],
            output[:tokens],
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            attn_metadata.runs,
            self.settings,
            self.scale,
        )
        return output


def _describe(name: str, layer: Any, config: VllmConfig, dtype: torch.dtype) -> Layer:
    impl = layer.impl
    return Layer(
        name=name,
        head_dim=impl.head_size,
        group=impl.num_queries_per_kv,
        page_size=config.cache_config.block_size,
        model_dtype=str(dtype).removeprefix("torch."),
        cache_dtype=impl.kv_cache_dtype,
        attention_type=AttentionType(impl.attn_type).value,
        sliding_window=impl.sliding_window != -1,
        alibi=impl.alibi_slopes is not None,
        softcap=impl.logits_soft_cap > 0,
        sinks=impl.sinks is not None,
        shares_cache=impl.kv_sharing_target_layer_name is not None,
    )


def _check_config(config: VllmConfig) -> None:
    reasons = {
        "KV transfer (kv_transfer_config)": config.kv_transfer_config is not None,
        "a model with state-space layers": config.model_config.is_hybrid,
        "decode context parallelism": config.parallel_config.decode_context_parallel_size > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"condensate_ext: cannot serve {reason}; unset CONDENSATE_VLLM.")


def decide_layers(config: VllmConfig, dtype: torch.dtype, settings: Settings) -> None:
    """Says for every layer of the model what computes it, once its weights are there.

    Raises:
        ValueError: a layer can neither be condensed nor is left to vLLM.
    """
    _check_config(config)
    kinds: dict[str, list[str]] = {}
    for name, layer in get_layers_from_vllm_config(config, Attention).items():
        if not isinstance(layer.impl, CondensateImpl):
            continue
        description = _describe(name, layer, config, dtype)
        own = description.sliding_window or settings.skips(name)
        if own and description.shares_cache:
            target = layer.kv_sharing_target_layer_name
            own = bool(settings.skips(target))  # both must find the cache in one layout
        if not own and (reason := unsupported(description)) is not None:
            raise ValueError(refusal(description, reason))
        layer.impl.condensed = not own
        kind = "condensed" if not own else "vLLM's own attention"
        why = " (sliding window)" if description.sliding_window else " (skipped)" if own else ""
        kinds.setdefault(kind + why, []).append(name)
    logger.info("condensate_ext: on, %s.", settings)
    for kind, names in kinds.items():
        logger.info("condensate_ext: %d layers %s: %s.", len(names), kind, ", ".join(names))
