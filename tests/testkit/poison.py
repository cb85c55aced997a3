"""Buffers that betray a kernel: NaN margins around inputs, NaN in the memory outputs will get."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "padded", "misaligned", "head_shared")


def embed(tensor: Tensor, layout: str) -> Tensor:
    """The values of `tensor` ([B, H, S, D]) as a view with the last dimension contiguous.

    contiguous   as it is, with NaN before and after
    transposed   a [B, S, H, D] buffer seen as [B, H, S, D], as transformers passes it
    padded       rows and heads farther apart than needed, NaN between
    misaligned   one element after an aligned address
    head_shared  a stride of 0 over the batch where the batches may be equal, else padded
    """
    b, h, s, d = tensor.shape
    if layout == "head_shared":
        return tensor[:1].contiguous().expand(b, h, s, d) if b > 1 else embed(tensor, "padded")
    shapes = {
        "contiguous": (b, h, s, d),
        "transposed": (b, s, h, d),
        "padded": (b, h + 1, s + 3, d + 8),
        "misaligned": (b, h, s, d),
    }
    shape, margin = shapes[layout], 64 + (layout == "misaligned")
    count = torch.Size(shape).numel()
    flat = torch.full((count + 2 * margin,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = flat[margin : margin + count].view(shape)
    view = view.transpose(1, 2) if layout == "transposed" else view[:, :h, :s, :d]
    view.copy_(tensor)
    return view


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """While active, torch fills uninitialised memory with NaN (integers: their largest value)."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def recycle_nan_memory(*shapes: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Hand NaN-filled memory of these sizes back to the allocator, for outputs to be placed in."""
    for shape in shapes:
        torch.full(shape, torch.nan, dtype=dtype, device=device)
