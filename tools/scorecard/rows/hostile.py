"""Tensor contents that lie: lists, counts, rows, budgets. Nothing else may change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import condensate_ext
import torch
from condensate_ext import ErrorWord
from torch import Tensor

from tools.scorecard.calls import OPS, Op, random_sizes, same
from tools.scorecard.line import Line, Piece, Tally

LIMIT = 2**31 - 1
CALLS = {"reduced": 20, "full": 120}  # a piece
# By op: the arguments whose contents a caller can get wrong, and the bits that tell.
CONTENTS: dict[str, dict[str, ErrorWord]] = {
    "block_sparse_attention": {
        "block_indices": ErrorWord.BLOCK_INDEX,
        "block_counts": ErrorWord.BLOCK_COUNT,
    },
    "omitted_mass": {"rows": ErrorWord.ROW_INDEX},
}


def _poison(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Wild numbers, all of them out of any range."""
    far = torch.tensor([-1, -2, -LIMIT - 1, LIMIT, LIMIT - 63, 2**20])
    pick = torch.randint(0, len(far), tensor.shape, generator=generator)
    return far[pick].to(tensor.device, tensor.dtype)


def _try(op: Op, arguments: dict[str, Any], name: str, piece: Piece, tally: Tally) -> None:
    """Batch entry 1 alone gets bad contents: entry 0 stays as it was, and the word tells."""
    condensate_ext.read_error_word(piece.device)
    before = op(arguments)
    words = f"{op.name}, {name}"
    tally.check(not condensate_ext.read_error_word(piece.device), f"{words}: set by a sound call")
    bad = arguments[name].clone()
    shared = bad.dim() == 1  # rows: of all batch entries
    place = slice(1, 2) if shared else 1
    bad[place] = _poison(bad[place], piece.generator())
    after = op({**arguments, name: bad})
    told = condensate_ext.read_error_word(piece.device)
    tally.check(bool(told & CONTENTS[op.name][name]), f"{words}: not told, {told!r}")
    if shared:
        kept = tuple(t[..., [0, 2]] for t in after), tuple(t[..., [0, 2]] for t in before)
    else:
        kept = tuple(t[:1] for t in after), tuple(t[:1] for t in before)
    tally.check(same(*kept), f"{words}: another entry changed")
    tally.check(same(op(arguments), before), f"{words}: a later call changed")


def run(piece: Piece) -> Tally:
    tally, rng = Tally(), piece.rng()
    for _ in range(CALLS[piece.size]):
        for op in OPS:
            for name in CONTENTS.get(op.name, {}):
                sizes = replace(random_sizes(rng), batch=2)
                arguments = op.make(sizes, piece.device, piece.generator())
                if name == "block_indices":
                    arguments["block_counts"].fill_(arguments[name].shape[-1])
                    arguments[name][:] = torch.arange(arguments[name].shape[-1])
                    if sizes.kv_len <= 64 * (arguments[name].shape[-1] - 1):
                        continue  # fewer blocks than places: the sound call would not be sound
                _try(op, arguments, name, piece, tally)
    return tally


LINE = Line(
    "hostile contents",
    "checks",
    "0 missed, 0 other entries changed",
    {"reduced": 1, "full": 8},
    run,
    why="Lists, counts and row numbers of one batch entry are wild: the error word says so, the "
    "other entries and later calls keep every bit. For accesses out of bounds run it under "
    "compute-sanitizer.",
)
