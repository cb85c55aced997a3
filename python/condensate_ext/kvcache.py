"""Attention of a few new queries over a cache of keys and values, paged or contiguous.

docs/decoding.md has the definition. A step of decoding appends the new keys and values to the
cache, brings the summaries up to date and attends:

>>> import torch, condensate_ext
>>> pages, page_size, kv_heads, head_dim = 80, 64, 2, 64
>>> key_cache, value_cache = torch.randn(2, pages, kv_heads, page_size, head_dim)
>>> block_table = torch.randperm(pages, dtype=torch.int32).view(1, pages)
>>> lengths = torch.tensor([5000], dtype=torch.int32)
>>> summaries = condensate_ext.KVSummaries.empty_for(key_cache, paged=True)
>>> cache = dict(block_table=block_table)
>>> summaries.update_(key_cache, value_cache, lengths, appended=5000, **cache)  # the prompt
>>> lengths += 1  # a new token: its key and value were just written to their slot
>>> summaries.update_(key_cache, value_cache, lengths, appended=1, **cache)
>>> query = torch.randn(1, 8, 1, head_dim)
>>> out = condensate_ext.attention_with_kvcache(
...     query, key_cache, value_cache, lengths, summaries=summaries, shortlist=2048, **cache)
>>> out.shape
torch.Size([1, 8, 1, 64])

Shared by all functions:

* Shapes: ``B`` sequences, ``Hq`` query heads, ``Hkv`` KV heads (``Hq`` a multiple of ``Hkv``, at
  most 64 times as many), ``Lq`` new queries of every sequence (up to 16), ``D`` head_dim (64, 96,
  128 or 256), ``N`` pages of ``P`` tokens.
* ``query``: ``[B, Hq, Lq, D]`` float16, bfloat16 or float32, of the last ``Lq`` positions of every
  sequence; any strides with a contiguous last dimension.
* ``key_cache``, ``value_cache``: ``[N, Hkv, P, D]`` in the query's dtype or float8_e4m3fn, any
  strides with a contiguous last dimension: a cache laid out ``[N, P, Hkv, D]`` is passed as
  ``cache.transpose(1, 2)``. With ``block_table`` (``[B, max_pages]`` int32, contiguous) token ``j``
  of sequence ``b`` is slot ``j % P`` of page ``block_table[b, j // P]``, and ``P`` is 16, 32, 48 or
  a multiple of 64. Without one ``N`` is ``B`` and ``P`` any capacity.
* ``cache_seqlens``: ``[B]`` int32, keys of each sequence, those of the new queries included. Query
  ``i`` has position ``cache_seqlens[b] - Lq + i`` and attends keys up to it.
* ``key_scale``, ``value_scale``: ``[Hkv]`` float32, factors of an 8-bit cache; default 1.
* Lengths and tables are read on the device and bounded there, so that a CUDA graph may be replayed
  with others. What is out of bounds is skipped and sets :func:`condensate_ext.read_error_word`.
* Forward only; under ``torch.autocast`` the query is cast, the caches are not. Invalid arguments
  raise ``ValueError`` naming the argument, its value, what is allowed and the fix; what this build
  or device cannot run raises ``RuntimeError``; a missing compiled library ``ImportError``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from condensate_ext._defaults import ANCHORS, CACHE_TOPK, SHORTLIST, WINDOW
from condensate_ext._loader import require

UNIT_KEYS = 8
POOL_KEYS = 64
HEAD_DIMS = (64, 96, 128, 256)
MAX_QUERIES = 16  # new tokens of a sequence


def record_rows(page_size: int, *, paged: bool = True) -> int:
    """Rows of a page's and head's record: its units, then its pools."""
    pool = min(page_size, POOL_KEYS) if paged else POOL_KEYS
    return -(-page_size // UNIT_KEYS) + -(-page_size // max(pool, 1))


@dataclass(frozen=True)
class KVSummaries:
    """8-bit summaries beside a cache: one record for each page and KV head.

    Records are addressed by physical page: a copied, shared or freed page takes its record along.
    """

    rows: Tensor
    """``[N, Hkv, R, D]`` int8: mean keys of units of 8 keys, then mean values of pools of 64."""
    scales: Tensor
    """``[N, Hkv, R]`` float32: what an entry of each row is worth."""
    key_center: Tensor | None = None
    """``[Hkv, D]`` float32 taken off every key before it is rounded, or None: where all keys share
    a large offset, their mean makes the summaries finer."""

    @classmethod
    def empty_for(
        cls, key_cache: Tensor, *, paged: bool, key_center: Tensor | None = None
    ) -> KVSummaries:
        """Summaries of the right size for a cache, to be filled by :meth:`update_`.

        Args:
            key_cache: ``[N, Hkv, P, D]``.
            paged: is the cache used with a ``block_table``?
            key_center: see the class.

        Returns:
            Summaries on the cache's device. They take ``R = ceil(P / 8) + ceil(P / min(P, 64))``
            rows a page and head (64-key pools without a table): about 7 % of a bfloat16 cache.
        """
        if key_cache.dim() != 4:
            raise ValueError(
                f"KVSummaries.empty_for: key_cache has shape {list(key_cache.shape)}, expected "
                "[pages, heads, tokens, head_dim]; reshape it."
            )
        pages, heads, page_size, head_dim = key_cache.shape
        records = (pages, heads, record_rows(page_size, paged=paged))
        return cls(
            key_cache.new_zeros((*records, head_dim), dtype=torch.int8),
            key_cache.new_zeros(records, dtype=torch.float32),
            key_center,
        )

    def update_(
        self,
        key_cache: Tensor,
        value_cache: Tensor,
        cache_seqlens: Tensor,
        *,
        appended: int,
        block_table: Tensor | None = None,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
    ) -> None:
        """Makes anew what the last ``appended`` keys of every sequence touch.

        An unfinished unit or pool averages the keys that it has. Call it after the new keys and
        values were written, before the attention; more ``appended`` than new does no harm, and 1 to
        16 are as cheap as a decoding step needs. Can be captured in a CUDA graph.

        Args:
            key_cache: ``[N, Hkv, P, D]``.
            value_cache: ``[N, Hkv, P, D]``.
            cache_seqlens: ``[B]`` int32, keys of each sequence, the appended included.
            appended: keys since the last update, at least; more than a sequence has means all.
            block_table: ``[B, max_pages]`` int32, or None for contiguous caches.
            key_scale: ``[Hkv]`` float32 of an 8-bit cache.
            value_scale: ``[Hkv]`` float32 of an 8-bit cache.

        Raises:
            ValueError: an argument is invalid.
            RuntimeError: this build or device cannot run the call.
        """
        require()
        torch.ops.condensate.update_kv_summaries_(
            self.rows,
            self.scales,
            key_cache,
            value_cache,
            cache_seqlens,
            appended=appended,
            block_table=block_table,
            key_center=self.key_center,
            key_scale=key_scale,
            value_scale=value_scale,
        )


def _summary_arguments(summaries: KVSummaries | None) -> dict[str, Tensor | None]:
    if summaries is None:
        return {}
    return {
        "summaries": summaries.rows,
        "summary_scales": summaries.scales,
        "key_center": summaries.key_center,
    }


def attention_with_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    summaries: KVSummaries | None = None,
    window: int = WINDOW,
    anchors: int = ANCHORS,
    topk: int = CACHE_TOPK,
    shortlist: int = SHORTLIST,
    top_p: float | None = None,
    far_field: bool = True,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    return_estimate: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Softmax attention of new queries over anchors, window and the tokens that matter, the rest
    condensed.

    A sequence with at most ``anchors + window + shortlist`` keys is attended in full. Of a longer
    one the summaries tell which ``shortlist`` keys are scored; of them the ``topk`` of largest
    softmax mass are attended, one list for each query and the heads that share a KV head.

    Args:
        query: ``[B, Hq, Lq, D]``, ``Lq`` up to 16.
        key_cache: ``[N, Hkv, P, D]``.
        value_cache: ``[N, Hkv, P, D]``.
        cache_seqlens: ``[B]`` int32.
        block_table: ``[B, max_pages]`` int32, or None: sequence ``b`` is page ``b``.
        summaries: kept up to date by :meth:`KVSummaries.update_`. None where the budget covers the
            capacity ``max_pages * P``, so that every key is attended.
        window: keys up to and including the query's own position; at least the pool of up to 64
            keys that the position cuts is attended too.
        anchors: first keys of the sequence.
        topk: tokens listed beside them, at most.
        shortlist: keys that are scored to find them; a multiple of 8, at least ``topk``.
        top_p: softmax mass that a list must hold, in (0, 1]: of the ``topk`` tokens the lightest
            are left out while what is left out of the shortlist holds at most ``1 - top_p``.
        far_field: condense what is not attended, in pools of up to 64 keys; False leaves it out.
        sinks: ``[Hq]`` float32, a logit of each head that joins its softmax without a value.
        softcap: ``c > 0`` replaces every score ``s`` by ``c * tanh(s / c)``; 0 for none.
        scale: factor of the scores. Default ``1 / sqrt(D)``.
        key_scale: ``[Hkv]`` float32 of an 8-bit cache.
        value_scale: ``[Hkv]`` float32 of an 8-bit cache.
        out: written and returned where given: ``[B, Hq, Lq, D]`` in the query's dtype, any strides
            with a contiguous last dimension.
        return_lse: also return the log-sum-exp.
        return_estimate: also return the omitted mass estimate.

    Returns:
        ``out`` ``[B, Hq, Lq, D]`` in the query's dtype. With ``return_lse`` or
        ``return_estimate`` a tuple of it and

        * ``lse`` ``[B, Hq, Lq]`` float32: natural log of everything in the softmax; ``-inf`` where
          a query sees no key.
        * ``omitted_mass_estimate`` ``[B, Hq, Lq]`` float32: estimated share of the softmax that was
          not attended, whether condensed or left out; 0 where every key is attended.

    Raises:
        ValueError: an argument is invalid.
        RuntimeError: an input requires grad, or this build or device cannot run the call.
    """
    require()
    arguments = dict(
        block_table=block_table,
        window=window,
        anchors=anchors,
        topk=topk,
        shortlist=shortlist,
        top_p=top_p,
        far_field=far_field,
        sinks=sinks,
        softcap=softcap,
        scale=scale,
        key_scale=key_scale,
        value_scale=value_scale,
        **_summary_arguments(summaries),
    )
    caches = (query, key_cache, value_cache, cache_seqlens)
    if out is None:
        out, lse, estimate = torch.ops.condensate.attention_with_kvcache(*caches, **arguments)
    else:
        lse, estimate = torch.ops.condensate.attention_with_kvcache_(*caches, out, **arguments)
    if not return_lse and not return_estimate:
        return out
    return (out, *([lse] if return_lse else []), *([estimate] if return_estimate else []))


def select_tokens_with_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    summaries: KVSummaries,
    block_table: Tensor | None = None,
    window: int = WINDOW,
    anchors: int = ANCHORS,
    topk: int = CACHE_TOPK,
    shortlist: int = SHORTLIST,
    top_p: float | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    key_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The lists of :func:`attention_with_kvcache` alone.

    A sequence that would be attended in full has a list too: the tokens of largest mass.

    Args: as for :func:`attention_with_kvcache`.

    Returns:
        A tuple of

        * ``token_indices``: ``[B, Hkv, Lq, topk]`` int32, ascending, padded with -1.
        * ``token_counts``: ``[B, Hkv, Lq]`` int32.

    Raises:
        ValueError: an argument is invalid.
        RuntimeError: an input requires grad, or this build or device cannot run the call.
    """
    require()
    indices, counts = torch.ops.condensate.select_tokens_with_kvcache(
        query,
        key_cache,
        value_cache,
        cache_seqlens,
        block_table=block_table,
        window=window,
        anchors=anchors,
        topk=topk,
        shortlist=shortlist,
        top_p=top_p,
        softcap=softcap,
        scale=scale,
        key_scale=key_scale,
        **_summary_arguments(summaries),
    )
    return indices, counts


def token_sparse_attention_with_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    token_indices: Tensor,
    token_counts: Tensor,
    *,
    block_table: Tensor | None = None,
    window: int = WINDOW,
    anchors: int = ANCHORS,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over anchors, window and given tokens; nothing is condensed.

    Args:
        token_indices: ``[B, Hkv, Lq, K]`` int32, strictly ascending tokens of each query, for all
            heads that share a KV head. An entry that is negative, not visible to its query or not
            ascending is skipped and sets the error word. A token in anchors or window counts once.
        token_counts: ``[B, Hkv, Lq]`` int32, entries of each list, 0 to ``K``.

    The others as for :func:`attention_with_kvcache`.

    Returns:
        ``out`` ``[B, Hq, Lq, D]`` in the query's dtype and ``lse`` ``[B, Hq, Lq]`` float32.

    Raises:
        ValueError: an argument is invalid.
        RuntimeError: an input requires grad, or this build or device cannot run the call.
    """
    require()
    out, lse = torch.ops.condensate.token_sparse_attention_with_kvcache(
        query,
        key_cache,
        value_cache,
        cache_seqlens,
        token_indices,
        token_counts,
        block_table=block_table,
        window=window,
        anchors=anchors,
        sinks=sinks,
        softcap=softcap,
        scale=scale,
        key_scale=key_scale,
        value_scale=value_scale,
    )
    return out, lse
