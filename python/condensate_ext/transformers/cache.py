"""Cache layers that keep summaries beside keys and values, so that a step only updates them.

They hold what transformers' own layers hold, and a model reads them in the same way; a layer that
was filled densely is taken over, and one of these may be continued densely.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from condensate_ext.kvcache import HEAD_DIMS, KVSummaries

_GROWTH = 4  # a full buffer grows by a quarter
_ROUND = 256


def decode_head_dim(*widths: int) -> int | None:
    """The narrowest head_dim of the decode kernels that holds all of them."""
    return next((d for d in HEAD_DIMS if d >= max(widths)), None)


class Summarised:
    """Summaries of a layer's buffers, made when first asked for and kept up to date from then."""

    keys: Any
    values: Any
    _summaries: list[KVSummaries] | None = None
    _starts: tuple[int, ...] | None = None

    def buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, Hkv, capacity, D]`` with one head_dim."""
        raise NotImplementedError

    def lengths(self) -> Tensor:
        """``[B]`` int32: keys of each row that the buffers hold."""
        raise NotImplementedError

    def rows(self, starts: tuple[int, ...] | None) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Caches to call the decode operator with: one for all rows, or one a padded row."""
        key, value, lengths = *self.buffers(), self.lengths()
        if starts is None:
            return [(key, value, lengths)]
        return [
            (key[b : b + 1, :, start:], value[b : b + 1, :, start:], lengths[b : b + 1] - start)
            for b, start in enumerate(starts)
        ]

    def summaries(self, starts: tuple[int, ...] | None) -> list[KVSummaries]:
        """For each of :meth:`rows`."""
        if self._summaries is None or self._starts != starts:
            self._starts = starts
            keys = [key for key, _, _ in self.rows(starts)]
            self._summaries = [KVSummaries.empty_for(key, paged=False) for key in keys]
            self._update(self.buffers()[0].shape[2])
        return self._summaries

    def _update(self, appended: int) -> None:
        for summaries, row in zip(self._summaries or (), self.rows(self._starts), strict=True):
            summaries.update_(*row, appended=appended)

    def _forget(self) -> None:
        self._summaries = None

    def _appended(self, count: int) -> None:
        """Keys and values were written."""
        if self._summaries is not None:
            self._update(count)

    def _named(self) -> tuple[Tensor, Tensor]:
        """Views for attention, which finds this layer by them."""
        views = self.keys.view_as(self.keys), self.values.view_as(self.values)
        for view in views:
            view.condensate_layer = self
        return views


class CondensedLayer(Summarised, DynamicLayer):  # type: ignore[misc]
    """A cache layer that grows in place, with summaries."""

    _key: Tensor | None = None
    _value: Tensor | None = None

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> CondensedLayer:
        """Takes over what ``layer`` holds."""
        adopted = cls()
        adopted.__dict__.update(layer.__dict__)
        return adopted

    def buffers(self) -> tuple[Tensor, Tensor]:
        assert self._key is not None and self._value is not None
        return self._key, self._value

    def lengths(self) -> Tensor:
        size = (self.keys.shape[0],)
        return torch.full(size, self.keys.shape[2], dtype=torch.int32, device=self.keys.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held, new = self.get_seq_length(), key_states.shape[2]
        self._reserve(key_states, value_states, held, held + new)
        self.keys, self.values = (
            self._append(buffer, states, held)
            for buffer, states in zip(self.buffers(), (key_states, value_states), strict=True)
        )
        self._appended(new)
        return self._named()

    @staticmethod
    def _append(buffer: Tensor, states: Tensor, held: int) -> Tensor:
        end, width = held + states.shape[2], states.shape[3]
        buffer[:, :, held:end, :width] = states
        return buffer[:, :, :end, :width]

    def _reserve(self, key_states: Tensor, value_states: Tensor, held: int, total: int) -> None:
        """Buffers of this layer for ``total`` keys that begin with the ``held`` ones."""
        owned = self._owns(self.keys, self._key) and self._owns(self.values, self._value)
        if held and owned and self._key is not None and self._key.shape[2] >= total:
            return
        capacity = -(-(total + total // _GROWTH) // _ROUND) * _ROUND
        width = decode_head_dim(key_states.shape[3], value_states.shape[3])
        old = (self.keys, self.values)
        self._key, self._value = (
            self._buffer(states, capacity, width, had if held else None)
            for states, had in zip((key_states, value_states), old, strict=True)
        )
        self._forget()

    @staticmethod
    def _owns(held: Tensor, buffer: Tensor | None) -> bool:
        return (
            buffer is not None
            and held.dim() == 4
            and held.data_ptr() == buffer.data_ptr()
            and held.stride() == buffer.stride()
            and held.shape[0] == buffer.shape[0]
        )

    @staticmethod
    def _buffer(states: Tensor, capacity: int, width: int | None, held: Tensor | None) -> Tensor:
        batch, heads, _, own = states.shape
        width = own if width is None else width
        make = states.new_empty if width == own else states.new_zeros
        buffer = make((batch, heads, capacity, width))
        if held is not None:
            buffer[:, :, : held.shape[2], :own] = held
        return buffer


class CondensedStaticLayer(Summarised, StaticLayer):  # type: ignore[misc]
    """A cache layer of fixed size, with summaries; it may live in a CUDA graph."""

    @classmethod
    def adopt(cls, layer: StaticLayer) -> CondensedStaticLayer:
        """Takes over what ``layer`` holds."""
        adopted = cls(layer.max_cache_len)
        adopted.__dict__.update(layer.__dict__)
        return adopted

    def buffers(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def lengths(self) -> Tensor:
        length: Tensor = self.cumulative_length.to(torch.int32)
        return length.expand(self.keys.shape[0]).contiguous()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states, *args, **kwargs)
        self._appended(key_states.shape[2])
        return self._named()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._forget()

    def reset(self) -> None:
        super().reset()
        self._forget()


def layer_of(key: Tensor, value: Tensor) -> Summarised | None:
    """The layer whose ``update`` returned both, where it keeps summaries.

    A model that attends other keys or values than those it caches, such as parts of them, has none.
    """
    layer: Summarised | None = getattr(key, "condensate_layer", None)
    return layer if getattr(value, "condensate_layer", None) is layer else None


def keep_summaries(cache: Cache, index: int) -> None:
    """Makes layer ``index`` of a cache one that keeps summaries, if it is a plain one."""
    own = getattr(cache, "self_attention_cache", cache)  # a decoder's, beside that of an encoder
    if own is not cache:
        return keep_summaries(own, index)
    if cache.offloading:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = CondensedLayer
    if index >= len(cache.layers):
        return
    layer = cache.layers[index]
    if type(layer) is DynamicLayer:
        cache.layers[index] = CondensedLayer.adopt(layer)
    elif type(layer) is StaticLayer and _decodes(layer):
        cache.layers[index] = CondensedStaticLayer.adopt(layer)


def _decodes(layer: StaticLayer) -> bool:
    if not layer.is_initialized:
        return True
    return layer.k_head_dim == layer.v_head_dim and layer.k_head_dim in HEAD_DIMS
