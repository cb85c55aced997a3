"""What a forward pass may see, in the tensor that transformers hands from its mask to attention.

transformers makes the masks of a forward pass before its layers run, and asks the function
registered here for them. The operators mask by position, so no mask is built where positions
suffice. A layer is told by a small 4-D tensor, whose dtype says which kind it is:

=========  ================  ====================================================================
dtype      shape             meaning
=========  ================  ====================================================================
None                         plainly causal, the last query at the last key
int64      [B, 1, 1, 2]      causal in a fixed-size cache: keys in use, position of the first query
int64      [B, 1, 1, 4]      padding: the same and the first and the end of each row's own keys
int32      [B, 1, 1, L]      packed sequences: the sequence that each token belongs to
int16      [1, 1, 1, w]      causal within a window of w keys, the last query at the last key
uint8      [B, 1, Lq, Lk]    whatever else is causal, key by key: such layers run dense
=========  ================  ====================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from condensate_ext.transformers.refusals import refuse

FIXED = 2
PADDED = 4

# Inner functions of transformers' masking_utils, by the names that it gives them.
_CAUSAL = "causal_mask_function"
_WINDOW = "sliding_window_overlay"
_CHUNK = "chunked_overlay"
_PACKED = "packed_sequence_mask_function"
_KNOWN = {_CAUSAL, _WINDOW, _CHUNK, _PACKED}
_COMBINE = {"and_masks", "remap_positions_for_packed_sequence", "add_offsets_to_mask_function"}


def describe_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **rest: Any,
) -> Tensor | None:
    """Takes the place of transformers' mask; called once a forward pass and kind of layer."""
    parts = _parts(mask_function)
    if unknown := parts.keys() - _KNOWN:
        refuse(
            f"a mask made by {', '.join(sorted(unknown))}, which is not a plainly causal one",
            "pass none, and use a model whose layers are causal, windowed or chunked",
        )
    window: int | None = parts[_WINDOW]["sliding_window"] if _WINDOW in parts else None
    if window is not None and isinstance(q_offset, int) and window >= q_offset + q_length:
        window = None  # it hides nothing yet
        parts.pop(_WINDOW)
    fixed = isinstance(q_offset, Tensor) or q_offset + q_length < kv_length + kv_offset
    aligned = not fixed and q_offset + q_length == kv_length + kv_offset
    padding = _padding(attention_mask, q_length, kv_length, kv_offset, q_offset, fixed=fixed)

    if parts.keys() == {_CAUSAL}:
        if padding is None and aligned and kv_offset == 0:
            return None
        return _bounds(padding, batch_size, q_length, q_offset, device)
    if parts.keys() == {_CAUSAL, _PACKED} and padding is None and aligned:
        sequences: Tensor = parts[_PACKED]["packed_sequence_mask"]
        return sequences.to(torch.int32)[:, None, None, :]
    if window is not None and parts.keys() == {_CAUSAL, _WINDOW} and padding is None and aligned:
        return torch.zeros(1, dtype=torch.int16, device=device).expand(1, 1, 1, window)
    from transformers.masking_utils import sdpa_mask

    mask: Tensor = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
        kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
        device=device, **{**rest, "allow_is_causal_skip": False},
    )  # fmt: skip
    return mask.to(torch.uint8)


def _parts(function: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    """The elementary masks that a mask function joins, each with the values it holds."""
    name = getattr(function, "__qualname__", repr(function)).split(".")[0]
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    held = {k: c.cell_contents for k, c in zip(names, function.__closure__ or (), strict=True)}
    if name not in _COMBINE:
        return {name: held}
    parts: dict[str, dict[str, Any]] = {}
    for value in held.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            if callable(inner):
                parts |= _parts(inner)
    return parts


def _padding(
    mask: Tensor | None,
    q_length: int,
    kv_length: int,
    kv_offset: int,
    q_offset: int | Tensor,
    *,
    fixed: bool,
) -> Tensor | None:
    """The [B, n] mask of tokens where some are padding; None where all count."""
    if mask is None:
        return None
    seen = int(q_offset) + q_length if fixed else kv_length + kv_offset
    if mask.shape[1] < seen or (mask.shape[1] > seen and not fixed):
        refuse(
            f"an attention_mask of {mask.shape[1]} tokens for {seen} in cache and input",
            "pass one that covers every token so far, or none",
        )
    mask = mask[:, :seen]
    return None if bool(mask.all()) else mask


def _bounds(
    padding: Tensor | None,
    batch_size: int,
    q_length: int,
    q_offset: int | Tensor,
    device: torch.device | str,
) -> Tensor:
    first = torch.as_tensor(q_offset, dtype=torch.int64, device=device).reshape(())
    fixed = torch.stack([first + q_length, first]).expand(batch_size, 2)
    if padding is None:
        return fixed[:, None, None, :]
    tokens = padding.to(torch.int64)
    start = tokens.argmax(1)
    end = start + tokens.sum(1)
    reached = tokens.shape[1] - tokens.flip(1).argmax(1)
    if bool(((end != reached) & (tokens.sum(1) > 0)).any()):
        refuse(
            "an attention_mask with zeros amid a row",
            "pad on one side only, the left one for generate()",
        )
    return torch.cat([fixed, start[:, None], end[:, None]], 1)[:, None, None, :]
