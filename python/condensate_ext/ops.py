"""The user functions: attention over anchors, a window and the keys that matter most, with the
rest condensed.

The idea of attending to a few anchors, a local window and the highest-scoring remaining keys is
that of https://arxiv.org/abs/2602.06317; docs/definition.md has the exact definition used here.

>>> import torch, condensate_ext
>>> query = torch.randn(1, 8, 640, 64)
>>> key, value = torch.randn(2, 1, 2, 640, 64)
>>> budget = dict(window=64, anchors=16, topk=128)
>>> out = condensate_ext.attention(query, key, value, **budget)
>>> out.shape
torch.Size([1, 8, 640, 64])

The stages of the block selectors, one after another, give the same:

>>> summaries = condensate_ext.block_summaries(key)
>>> lists = condensate_ext.select_blocks(query, summaries, key=key, **budget)
>>> ranges = dict(window=64, anchors=16)
>>> staged, lse = condensate_ext.block_sparse_attention(query, key, value, *lists, **ranges)
>>> torch.testing.assert_close(staged, out)

Shared by all functions:

* Shapes: ``B`` batch, ``Hq`` query heads, ``Hkv`` key/value heads (``Hq`` a multiple of ``Hkv``, at
  most 64 times as many), ``Lq`` queries, ``Lk`` keys, ``D`` head_dim (a multiple of 8 up to 256).
  Any of ``B``, ``Lq`` and ``Lk`` may be 0, and ``Lq`` may exceed ``Lk``.
* ``query``, ``key``, ``value``: float16, bfloat16 or float32, one dtype and one device, any strides
  with a contiguous last dimension. CPU tensors run on the CPU, CUDA tensors on their GPU, on the
  current stream, without waiting for it. Nothing is cast or moved silently.
* Query ``i`` has position ``p = i + Lk - Lq``: the last query is at the last key. With
  ``causal=True`` it attends keys ``<= p`` only.
* ``window``, ``anchors``, ``topk``: counts of keys. ``scale`` multiplies the scores, by default
  ``1 / sqrt(D)``. Log-sum-exps are natural and float32; a row without keys has output 0 and
  log-sum-exp ``-inf``.
* Forward only: with grad mode on, an input that requires grad raises ``RuntimeError``. Use
  ``torch.no_grad()`` or ``.detach()``.
* Under ``torch.autocast`` queries, keys, values and summaries are cast to the autocast dtype, as
  ``torch.nn.functional.scaled_dot_product_attention`` does.
* Invalid arguments raise ``ValueError`` naming the argument, its value, what is allowed and the
  fix; what this build or device cannot run raises ``RuntimeError``; a missing compiled library
  raises ``ImportError``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from condensate_ext._arguments import checked
from condensate_ext._checks import fail
from condensate_ext._defaults import ANCHORS, TOPK, WINDOW
from condensate_ext._loader import require
from condensate_ext._selectors import BlockSelector, Selector, selector_number


@checked
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int = WINDOW,
    anchors: int = ANCHORS,
    topk: int = TOPK,
    topk_per_head: Tensor | None = None,
    top_p: float | None = None,
    far_field: bool | None = None,
    selector: Selector = "block",
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of every query over anchors, window and selected keys, the rest condensed.

    Each query attends the first ``anchors`` keys, the last ``window`` keys up to its own position,
    and ``topk`` further keys, each key once. With the far field the keys before them that it does
    not attend enter its softmax too, by their means: up to 128 pools of consecutive 64-key blocks,
    each as one term that weighs as much as it has keys. That is an approximation, which leaves
    nothing out. A budget that reaches every key gives dense attention, and so do the block
    selectors from 1,024 keys on where selecting would not be faster: where an average query sees at
    most 5/4 of the keys that it would attend (in a causal prefill, up to 2.5 times the budget).

    Args:
        query: ``[B, Hq, Lq, D]``.
        key: ``[B, Hkv, Lk, D]``.
        value: ``[B, Hkv, Lk, D]``.
        window: keys up to and including the query's own position; without causality, keys less than
            ``window`` away on both sides. 0 for none.
        anchors: first keys of the sequence, attended by every query that may see them. 0 for none.
        topk: keys selected beside them; for the block selectors a multiple of 64.
        topk_per_head: ``[Hkv]`` int32 on the query's device, contiguous: keys for each KV head, at
            most ``topk``, rounded down to whole blocks. For the block selectors.
        top_p: softmax mass that a list must hold, in (0, 1]: of the blocks that ``topk`` allows,
            the lightest are left out while their estimated masses add up to at most ``1 - top_p``,
            so lists are short where few keys matter. None takes ``topk`` keys. For the block
            selectors.
        far_field: True condenses what is not attended, and attends the blocks of anchors, window
            and list as a whole, also keys outside a query's own window; False leaves it out. None
            is True, but for ``"exact"``, which has no far field.
        selector: ``"block"`` ranks 64-key blocks by their estimated softmax mass, one list for a
            tile of up to 64 queries of the heads that share a KV head; ``"quest"`` (min/max
            bounds) and ``"mean"`` rank them otherwise; ``"exact"`` takes the highest-scoring keys
            of each query and head by scoring all of them.
        causal: attend no key after the query's position.
        scale: factor of the scores; positive for the block selectors. Default ``1 / sqrt(D)``.

    Returns:
        ``[B, Hq, Lq, D]``, contiguous, in the query's dtype.

    Raises:
        ValueError: an argument is invalid.
        RuntimeError: an input requires grad, or this build or device cannot run the call.
    """
    require()
    out: Tensor = torch.ops.condensate.attention(
        query,
        key,
        value,
        window=window,
        anchors=anchors,
        topk=topk,
        topk_per_head=topk_per_head,
        top_p=top_p,
        far_field=far_field,
        selector=selector_number("attention", selector),
        causal=causal,
        scale=scale,
    )
    return out


@checked
def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int = WINDOW,
    anchors: int = ANCHORS,
    topk: int = TOPK,
    topk_per_head: Tensor | None = None,
    top_p: float | None = None,
    far_field: bool | None = None,
    selector: Selector = "block",
    causal: bool = True,
    scale: float | None = None,
    estimate: bool = True,
) -> tuple[Tensor, ...]:
    """:func:`attention`, with its log-sum-exp and how much softmax mass it did not attend.

    >>> query, key, value = torch.randn(3, 1, 4, 300, 64)
    >>> out, lse, omitted_mass_estimate = attention_forward(query, key, value)
    >>> out, lse = attention_forward(query, key, value, estimate=False)

    Args:
        estimate: also estimate the omitted mass. False costs no more than :func:`attention`.

    The others as for :func:`attention`.

    Returns:
        A tuple of

        * ``out``: ``[B, Hq, Lq, D]``, contiguous, in the query's dtype.
        * ``lse``: ``[B, Hq, Lq]`` float32, natural log of the sum of ``exp(scale * q·k)`` over
          everything that entered the softmax: the attended keys and, with the far field, ``n *
          exp(scale * q·mean)`` for every pool of ``n`` condensed keys. The far field only adds what
          the keys' own terms add at least, so it never exceeds that of dense attention by more
          than rounding.
        * ``omitted_mass_estimate``, with ``estimate``: ``[B, Hq, Lq]`` float32 in [0, 1], the share
          of the full softmax outside anchors, window and selected keys, left out or condensed. With
          the far field and several queries the attention estimates it, row by row, from the weight
          of the pools and what listed blocks tell of their shortfall; else, for the block
          selectors, the selection does from its scores of summaries, which is coarser and takes
          longer (a single query's looks at keys). Exact up to rounding for ``"exact"``; 0 where
          the budget reaches every key. :func:`omitted_mass` measures it from the log-sum-exp of a
          call with ``far_field=False``.

    Raises: as for :func:`attention`.
    """
    require()
    results: tuple[Tensor, ...] = torch.ops.condensate.attention_forward(
        query,
        key,
        value,
        window=window,
        anchors=anchors,
        topk=topk,
        topk_per_head=topk_per_head,
        top_p=top_p,
        far_field=far_field,
        selector=selector_number("attention_forward", selector),
        causal=causal,
        scale=scale,
        estimate=estimate,
    )
    return results if estimate else results[:2]


@checked
def block_summaries(key: Tensor, *, selector: BlockSelector = "block") -> Tensor:
    """Everything that block selection needs to know about the keys, in one pass over them.

    Args:
        key: ``[B, Hkv, Lk, D]``, with positions already encoded.
        selector: ``"block"`` keeps the mean of every 8 and of every 64 keys, ``"quest"`` the
            elementwise maximum and minimum of every 16, ``"mean"`` the mean of every 64.

    Returns:
        ``[B, Hkv, U, Ds]`` in the key's dtype, with ``U = ceil(Lk / 64) * (9, 4 or 1)`` and
        ``Ds = D``, or ``2 * D`` (maximum, then minimum) for ``"quest"``. The rows of a block are
        side by side; for ``"block"`` its 8 means of 8 keys, then the one of 64.

    Raises:
        ValueError: an argument is invalid.
        RuntimeError: ``key`` requires grad, or this build or device cannot run the call.
    """
    require()
    summaries: Tensor = torch.ops.condensate.block_summaries(
        key, selector=selector_number("block_summaries", selector)
    )
    return summaries


@checked
def select_blocks(
    query: Tensor,
    summaries: Tensor,
    key: Tensor | None = None,
    *,
    kv_len: int | None = None,
    window: int = WINDOW,
    anchors: int = ANCHORS,
    topk: int = TOPK,
    topk_per_head: Tensor | None = None,
    top_p: float | None = None,
    far_field: bool = True,
    selector: BlockSelector = "block",
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Picks, for every tile of queries, the 64-key blocks of largest estimated softmax mass.

    A tile is ``P`` consecutive queries of all ``G = Hq / Hkv`` heads of one KV head; ``P`` is the
    largest power of two with ``P * G <= 128``, at most 64, and ``T = ceil(Lq / P)``. Blocks are
    scored by averaged queries of up to 8 positions. ``"block"`` ranks a shortlist again past
    262,144 keys (of ``max(64, 2 * K)`` blocks) and for a single query whose keys are given (of
    ``max(64, 4 * K)``). Ties go to the lower block. The result does not depend on what else is in
    the batch.

    Args:
        query: ``[B, Hq, Lq, D]``.
        summaries: ``[B, Hkv, U, Ds]`` from :func:`block_summaries` with the same ``selector``.
        key: ``[B, Hkv, Lk, D]``, the keys that were summarised, or None. With them ``"block"``
            ranks the blocks of a single query (``Lq = 1``) by their keys, as :func:`attention`
            does; other calls do not read them.
        kv_len: ``Lk``, the number of keys that were summarised. May be left out with ``key``.
        window: as for :func:`attention`; blocks that lie in it for every query are not listed.
        anchors: as for :func:`attention`; blocks of nothing but anchors are not listed.
        topk: budget in keys, a multiple of 64; a list has ``K = topk // 64`` places.
        topk_per_head: as for :func:`attention`.
        top_p: as for :func:`attention`.
        far_field: are the lists for an attention with far field, the default? It attends all
            blocks of anchors and windows as a whole, so none of them is listed.
        selector: what the summaries are.
        causal: as for :func:`attention`.
        scale: as for :func:`attention`; positive.

    Returns:
        A tuple of ``block_indices`` ``[B, Hkv, T, K]`` int32, strictly ascending and -1 after the
        last, and ``block_counts`` ``[B, Hkv, T]`` int32.

    Raises:
        ValueError: an argument is invalid.
        RuntimeError: an input requires grad, or this build or device cannot run the call.
    """
    require()
    if kv_len is None:
        kv_len = _length_of(key)
    indices, counts = torch.ops.condensate.select_blocks(
        query,
        summaries,
        key,
        kv_len=kv_len,
        window=window,
        anchors=anchors,
        topk=topk,
        topk_per_head=topk_per_head,
        top_p=top_p,
        far_field=far_field,
        selector=selector_number("select_blocks", selector),
        causal=causal,
        scale=scale,
    )
    return indices, counts


def _length_of(key: Tensor | None) -> int:
    if key is None:
        fail(
            "select_blocks",
            "kv_len and key are None, expected one of them; pass key=key, which a single query's "
            "list is chosen by, or kv_len=key.shape[2].",
        )
    return key.shape[-2]


@checked
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    *,
    window: int = WINDOW,
    anchors: int = ANCHORS,
    far_field: bool = True,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over anchors, window and the listed 64-key blocks, the rest optionally
    condensed.

    Lists may come from :func:`select_blocks` or from anywhere else: every visible key of a listed
    block is attended, once. An entry that is out of range or not ascending is skipped, a count
    outside ``0..K`` is clamped, and :func:`condensate_ext.read_error_word` tells; with
    ``CONDENSATE_STRICT=1`` in the environment the call waits and raises instead.

    Args:
        query: ``[B, Hq, Lq, D]``.
        key: ``[B, Hkv, Lk, D]``.
        value: ``[B, Hkv, Lk, D]``.
        block_indices: ``[B, Hkv, T, K]`` int32, contiguous; see :func:`select_blocks` for ``T``.
        block_counts: ``[B, Hkv, T]`` int32, contiguous.
        window: as for :func:`attention`.
        anchors: as for :func:`attention`.
        far_field: True, the default, condenses what is not attended, as for :func:`attention`, and
            attends anchors and window in whole blocks; False leaves it out.
        causal: as for :func:`attention`.
        scale: as for :func:`attention`; any finite number.

    Returns:
        A tuple of ``out`` ``[B, Hq, Lq, D]`` in the query's dtype and ``lse`` ``[B, Hq, Lq]``
        float32, over everything that entered the softmax.

    Raises:
        ValueError: an argument is invalid.
        RuntimeError: an input requires grad, or this build or device cannot run the call.
    """
    require()
    out, lse = torch.ops.condensate.block_sparse_attention(
        query,
        key,
        value,
        block_indices,
        block_counts,
        window=window,
        anchors=anchors,
        far_field=far_field,
        causal=causal,
        scale=scale,
    )
    return out, lse
