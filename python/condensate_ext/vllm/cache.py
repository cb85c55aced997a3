"""A layer's cache as the plugin lays it out, and what is computed over it. Knows nothing of vLLM.

The memory that vLLM gives a layer is carved into keys and values ``[N, Hkv, 2 P, D]`` (a page's
keys, then its values), records ``[N, Hkv, R, D]`` int8 and their scales ``[N, Hkv, R]`` float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from condensate_ext.kvcache import (
    MAX_QUERIES,
    KVSummaries,
    attention_with_kvcache,
    record_rows,
)
from condensate_ext.ops import attention
from condensate_ext.vllm.settings import Settings


def record_bytes_per_token(page_size: int, head_dim: int, element_bytes: int) -> int:
    """What a token and head must have beside key and value for records and scales, in whole
    elements."""
    record = record_rows(page_size) * (head_dim + 4)
    return -(-record // (page_size * element_bytes)) * element_bytes


def carve(cache: Tensor, head_dim: int) -> tuple[Tensor, KVSummaries]:
    """The parts of a layer's cache.

    Args:
        cache: ``[N, Hkv, P, C]``, contiguous, ``C`` elements for keys, values and records.
        head_dim: ``D``.

    Returns:
        Keys and values ``[N, Hkv, P, 2 D]``, contiguous, and the summaries, all views of it.
    """
    pages, heads, page_size, _ = cache.shape
    rows, count = record_rows(page_size), pages * heads
    data = cache.view(-1)
    stored = count * page_size * 2 * head_dim
    both = data[:stored].view(pages, heads, page_size, 2 * head_dim)
    rest = data[stored:].view(torch.int8)
    scales_begin = count * rows * head_dim
    records = rest[:scales_begin].view(pages, heads, rows, head_dim)
    scales = rest[scales_begin : scales_begin + 4 * count * rows].view(torch.float32)
    return both, KVSummaries(records, scales.view(pages, heads, rows))


@dataclass(frozen=True)
class Rows:
    """Sequences ``[first, last)`` of a batch with ``query_len`` new tokens each."""

    first: int
    last: int
    query_len: int
    token: int  # of the batch: the first of them
    cache_len: int  # keys of the longest


def plan_rows(query_lens: list[int], cache_lens: list[int]) -> list[Rows]:
    """Splits a batch into runs for one call each: neighbours of one length up to 16, and every
    longer chunk of a prompt by itself."""
    runs: list[Rows] = []
    token = 0
    for b, (new, length) in enumerate(zip(query_lens, cache_lens, strict=True)):
        before = runs[-1] if runs else None
        if before and before.last == b and before.query_len == new <= MAX_QUERIES:
            longest = max(before.cache_len, length)
            runs[-1] = Rows(before.first, b + 1, new, before.token, longest)
        elif new > 0:
            runs.append(Rows(b, b + 1, new, token, length))
        token += new
    return runs


@dataclass(frozen=True)
class LayerCache:
    """A condensed layer's cache."""

    key: Tensor  # [N, Hkv, P, D]
    value: Tensor  # [N, Hkv, P, D]
    summaries: KVSummaries

    @classmethod
    def of(cls, cache: Tensor, head_dim: int) -> LayerCache:
        """As :func:`carve`."""
        both, summaries = carve(cache, head_dim)
        pages, heads, page_size, _ = both.shape
        key, value = both.view(pages, heads, 2 * page_size, head_dim).chunk(2, dim=2)
        return cls(key, value, summaries)

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Stores new keys and values.

        Args:
            key: ``[tokens, Hkv, D]``.
            value: ``[tokens, Hkv, D]``.
            slots: ``[tokens]`` or fewer, ``page * P + slot``; negative ones are padding.
        """
        kept = slots >= 0
        there = slots[kept].long()
        page, slot = there // self.key.shape[2], there % self.key.shape[2]
        self.key[page, :, slot] = key[: len(slots)][kept]
        self.value[page, :, slot] = value[: len(slots)][kept]

    def attend(
        self,
        query: Tensor,
        out: Tensor,
        lengths: Tensor,
        table: Tensor,
        runs: list[Rows],
        settings: Settings,
        scale: float,
    ) -> None:
        """Brings the summaries up to date with a batch, then attends it.

        All summaries come first: sequences of one batch may share pages that it fills.

        Args:
            query: ``[tokens, Hq, D]``.
            out: like ``query``; written.
            lengths: ``[B]`` int32, keys of each sequence with the new ones.
            table: ``[B, max_pages]`` int32.
            runs: from :func:`plan_rows`.
            settings: what to attend.
            scale: factor of the scores.
        """
        for run in runs:
            some = slice(run.first, run.last)
            self.summaries.update_(
                self.key, self.value, lengths[some], appended=run.query_len,
                block_table=table[some],
            )  # fmt: skip
        for run in runs:
            some = slice(run.first, run.last)
            tokens = slice(run.token, run.token + (run.last - run.first) * run.query_len)
            step = run.query_len <= MAX_QUERIES
            compute = self._attend_step if step else self._attend_chunk
            compute(
                query[tokens], out[tokens], lengths[some], table[some], run, settings, scale
            )

    def _attend_step(
        self, query: Tensor, out: Tensor, lengths: Tensor, table: Tensor, run: Rows,
        settings: Settings, scale: float,
    ) -> None:  # fmt: skip
        shape = (run.last - run.first, run.query_len, *query.shape[1:])
        attention_with_kvcache(
            query.view(shape).transpose(1, 2),
            self.key,
            self.value,
            lengths,
            block_table=table,
            summaries=self.summaries,
            window=settings.window,
            anchors=settings.anchors,
            topk=settings.topk,
            shortlist=settings.shortlist,
            top_p=settings.top_p,
            scale=scale,
            out=out.view(shape).transpose(1, 2),
        )

    def _attend_chunk(
        self, query: Tensor, out: Tensor, lengths: Tensor, table: Tensor, run: Rows,
        settings: Settings, scale: float,
    ) -> None:  # fmt: skip
        result = attention(
            query.transpose(0, 1)[None],
            self._gather(self.key, table[0], run.cache_len),
            self._gather(self.value, table[0], run.cache_len),
            window=settings.window,
            anchors=settings.anchors,
            topk=settings.prefill_topk,
            scale=scale,
        )
        out.copy_(result[0].transpose(0, 1))

    @staticmethod
    def _gather(cache: Tensor, table: Tensor, length: int) -> Tensor:
        """A sequence's keys or values, ``[1, Hkv, length, D]``."""
        pages = cache[table[: -(-length // cache.shape[2])].long()]
        return pages.transpose(0, 1).flatten(1, 2)[None, :, :length]
