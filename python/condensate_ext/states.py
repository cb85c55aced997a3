"""What is done with an attention's results: measuring what it left out, merging two of them.

>>> import torch, condensate_ext
>>> query, key, value = torch.randn(3, 1, 4, 900, 64)
>>> budget = dict(topk=128, window=64, anchors=16)
>>> out, lse = condensate_ext.attention_forward(
...     query, key, value, far_field=False, estimate=False, **budget)
>>> left_out = condensate_ext.omitted_mass(query, key, lse)
>>> bool(left_out[:, :, :64].max() < 1e-3)  # all within the window
True
>>> bool(left_out[:, :, 800:].min() > 0.1)
True
"""

from __future__ import annotations

import torch
from torch import Tensor

from condensate_ext._arguments import checked
from condensate_ext._loader import require


@checked
def omitted_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    rows: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Measures how much softmax mass an attention left out, by scoring every visible key.

    It audits a support: pass the log-sum-exp of a call with ``far_field=False``. That of the far
    field also holds the condensed keys, by a bound from below of their mass, so against it only
    what this bound misses would be measured.

    Args:
        query: ``[B, Hq, Lq, D]``.
        key: ``[B, Hkv, Lk, D]``.
        lse: ``[B, Hq, Lq]`` float32, contiguous: the log-sum-exp that the attention without far
            field returned.
        rows: ``[R]`` int64, the query indices to audit, in any order; all of them when None. An
            index out of range gives NaN and is told by :func:`condensate_ext.read_error_word`.
        causal: as in the audited call.
        scale: as in the audited call.

    Returns:
        ``[B, Hq, R]`` float32 in [0, 1], ``R = Lq`` when ``rows`` is None:
        ``1 - exp(lse - lse_full)``, 0 for a row that sees no key.

    Raises:
        ValueError: an argument is invalid.
        RuntimeError: an input requires grad, or this build or device cannot run the call.
    """
    require()
    omitted: Tensor = torch.ops.condensate.omitted_mass(
        query, key, lse, rows=rows, causal=causal, scale=scale
    )
    return omitted


@checked
def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Merges two attention results over disjoint keys into the result over their union.

    Args:
        out_a: ``[B, H, L, D]``, contiguous.
        lse_a: ``[B, H, L]`` float32, contiguous.
        out_b: like ``out_a``, same dtype and device.
        lse_b: like ``lse_a``.

    Returns:
        A tuple of ``out`` ``[B, H, L, D]`` in the dtype of ``out_a`` and ``lse`` ``[B, H, L]``
        float32.

    Raises:
        ValueError: an argument is invalid.
        RuntimeError: an input requires grad, or this build or device cannot run the call.
    """
    require()
    out, lse = torch.ops.condensate.merge_states(out_a, lse_a, out_b, lse_b)
    return out, lse
