"""Sizes beyond 32 bits and beyond grids, and memory that is not there."""

from __future__ import annotations

import condensate_ext
import torch
from torch import Tensor

from tools.scorecard.line import Line, Piece, Tally

FAR = 2**31 + 64  # elements


def _many_heads(piece: Piece, tally: Tally) -> None:
    """batch x heads above 65,535: each like the first."""
    batch, heads = (70_000, 1) if piece.full else (66_000, 1)
    one = torch.randn(1, heads, 3, 8, generator=piece.generator()).to(piece.device)
    many = one.expand(batch, heads, 3, 8)
    for options in ({"topk": 0, "window": 2}, {"topk": 64}, {"topk": 1, "selector": "exact"}):
        out, lse, _ = condensate_ext.attention_forward(many, many, many, **options)
        single = condensate_ext.attention_forward(one, one, one, **options)
        good = bool((out == single[0]).all() and (lse == single[1]).all())
        tally.check(good, f"{batch} x {heads} heads, {options}")


def _far_strides(piece: Piece, tally: Tally) -> None:
    """Rows more than 2^31 elements apart; the memory between is never touched."""
    near = torch.randn(2, 1, 3, 16, generator=piece.generator()).half().to(piece.device)
    try:
        buffer = torch.empty(FAR + near.numel(), dtype=near.dtype, device=piece.device)
    except RuntimeError:
        tally.add("left out: no address space", 1)
        return
    far = torch.as_strided(buffer, near.shape, (FAR, 48, 16, 1)).copy_(near)
    expected = condensate_ext.attention_forward(near, near, near, topk=64)
    actual = condensate_ext.attention_forward(far, far, far, topk=64)
    tally.check(all(map(torch.equal, expected, actual)), "strides beyond 2^31")


def _many_keys(piece: Piece, tally: Tally) -> None:
    """Two million keys, most of them one row by a stride of 0; the last ones decide."""
    length = 2**21 if piece.full else 2**18
    query = torch.zeros(1, 1, 1, 8, device=piece.device)
    query[..., 0] = 8
    key = torch.zeros(1, 1, length, 8, device=piece.device)
    value = torch.zeros_like(key)
    key[:, :, length // 3, 0] = 20  # a needle
    value[:, :, length // 3] = 1
    for selector in ("block", "exact"):
        out = condensate_ext.attention(query, key, value, topk=64, selector=selector)
        tally.check(bool((out > 0.99).all()), f"the needle among {length} keys, {selector}")


def _no_memory(piece: Piece, tally: Tally) -> None:
    """An output that no machine holds: a RuntimeError, and later calls are right."""
    query = torch.zeros(1, 1, 1, 8, device=piece.device).expand(2**20, 1, 2**21, 8)
    small = torch.ones(1, 1, 4, 8, device=piece.device)
    expected = condensate_ext.attention(small, small, small)
    try:
        condensate_ext.attention(query, query[:, :, :1], query[:, :, :1])
        tally.check(False, "an output of 64 TiB was made")
    except RuntimeError as error:
        tally.check("split the call" in str(error) or "memory" in str(error), f"{error}")
    except ValueError as error:
        tally.check("split the call" in str(error), f"{error}")
    tally.check(torch.equal(condensate_ext.attention(small, small, small), expected), "after it")


def _negative_and_huge(piece: Piece, tally: Tally) -> None:
    """Sizes of which products overflow: refused, whatever their pointers."""
    one = torch.zeros(1, 1, 1, 8, device=piece.device)

    def wide(*sizes: int) -> Tensor:
        return one.expand(*sizes, 8)

    for q, k in (((2**30, 1, 2**28), (2**30, 1, 1)), ((1, 2**31, 1), (1, 2**31, 1)),
                 ((2**31, 1, 1), (2**31, 1, 1)), ((1, 1, 2**31), (1, 1, 1))):  # fmt: skip
        try:
            condensate_ext.attention(wide(*q), wide(*k), wide(*k))
            tally.check(False, f"{q} and {k} were accepted")
        except (ValueError, RuntimeError) as error:
            tally.check("expected" in str(error) or "split" in str(error), f"{q}, {k}: {error}")


TRIALS = (_many_heads, _far_strides, _many_keys, _no_memory, _negative_and_huge)


def run(piece: Piece) -> Tally:
    tally = Tally()
    TRIALS[piece.index](piece, tally)
    return tally


LINE = Line(
    "sizes",
    "checks",
    "right, or a clear error",
    {"reduced": len(TRIALS), "full": len(TRIALS)},
    run,
    why="More than 65,535 heads, strides past 2^31 elements, 2M keys, outputs that no memory "
    "holds, "
    "sizes whose products overflow.",
)
