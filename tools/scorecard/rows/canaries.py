"""NaN around inputs and NaN where outputs will be: none of it may show."""

from __future__ import annotations

from typing import Any

import torch

from tests.testkit.poison import LAYOUTS, embed, poisoned_outputs
from tools.scorecard.calls import OPS, random_sizes, same
from tools.scorecard.line import Line, Piece, Tally

CALLS = {"reduced": 8, "full": 20}  # of each op in a piece
ROW_ARGUMENTS = ("query", "key", "value")  # that may have any strides


def _framed(name: str, value: Any, layout: str) -> Any:
    """A tensor in its layout amid NaN; one that must be contiguous amid NaN or wild numbers."""
    if not isinstance(value, torch.Tensor):
        return value
    if name in ROW_ARGUMENTS:
        return embed(value, layout)
    wild = torch.nan if value.is_floating_point() else torch.iinfo(value.dtype).max
    flat = torch.full((value.numel() + 128,), wild, dtype=value.dtype, device=value.device)
    view = flat[64 : 64 + value.numel()].view(value.shape)
    return view.copy_(value)


def run(piece: Piece) -> Tally:
    tally, rng = Tally(), piece.rng()
    layouts = [layout for layout in LAYOUTS if layout not in ("head_shared", "misaligned")]
    for op in OPS:
        for _ in range(CALLS[piece.size]):
            sizes = random_sizes(rng)
            arguments = op.make(sizes, piece.device, piece.generator())
            expected = op(arguments)
            framed = {
                name: _framed(name, value, rng.choice(layouts)) for name, value in arguments.items()
            }
            with poisoned_outputs():
                actual = op(framed)
            tally.check(same(actual, expected), f"{op.name}: {sizes}")
    return tally


LINE = Line(
    "canaries",
    "calls",
    "100 % unchanged",
    {"reduced": 1, "full": 12},
    run,
    why="Each op on tensors amid NaN (strided, padded, transposed) and wild integers, with NaN in "
    "all memory that it allocates, gives the bits that it gives on plain tensors.",
)
