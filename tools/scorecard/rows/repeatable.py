"""The same bits again: from launch to launch, whatever else is in the batch, on any threads."""

from __future__ import annotations

from dataclasses import replace

import torch

from tools.scorecard.calls import OPS, random_sizes, same
from tools.scorecard.line import Line, Piece, Tally

LAUNCH_COUNT = {"reduced": 10, "full": 250}


def run_launches(piece: Piece) -> Tally:
    tally, rng = Tally(), piece.rng()
    for op in OPS:
        sizes = random_sizes(rng)
        arguments = op.make(sizes, piece.device, piece.generator())
        first = op(arguments)
        for _ in range(LAUNCH_COUNT[piece.size]):
            tally.check(same(op(arguments), first), f"{op.name} differs: {sizes}")
        tally.add("configurations", 1)
    return tally


def run_batches(piece: Piece) -> Tally:
    """One entry alone, and among others, gives the same."""
    tally, rng = Tally(), piece.rng()
    for op in OPS:
        sizes = replace(random_sizes(rng), batch=3)
        arguments = op.make(sizes, piece.device, piece.generator())
        whole = op(arguments)
        for entry in range(3):
            alone = {
                name: value[entry : entry + 1].contiguous()
                if isinstance(value, torch.Tensor) and value.dim() > 1
                else value
                for name, value in arguments.items()
            }
            part = tuple(t[entry : entry + 1] for t in whole)
            tally.check(same(op(alone), part), f"{op.name}, entry {entry}: {sizes}")
    return tally


def run_threads(piece: Piece) -> Tally:
    tally, rng = Tally(), piece.rng()
    before = torch.get_num_threads()
    try:
        for op in OPS:
            sizes = random_sizes(rng)
            arguments = op.make(sizes, piece.device, piece.generator())
            torch.set_num_threads(1)
            expected = op(arguments)
            for threads in (2, 3, 7):
                torch.set_num_threads(threads)
                tally.check(same(op(arguments), expected), f"{op.name}, {threads} threads: {sizes}")
    finally:
        torch.set_num_threads(before)
    return tally


LAUNCHES = Line(
    "run to run",
    "launches",
    "64 configurations x 250, equal",
    {"reduced": 1, "full": 16},
    run_launches,
    why="Every op again and again on the same tensors, bit for bit.",
)
BATCHES = Line(
    "batch invariance",
    "pairs",
    "2,048, equal",
    {"reduced": 2, "full": 86},
    run_batches,
    why="Each entry of a batch by itself and among the others, bit for bit.",
)
THREADS = Line(
    "thread counts",
    "pairs",
    "equal",
    {"reduced": 1, "full": 24},
    run_threads,
    devices=("cpu",),
    why="1, 2, 3 and 7 threads give the same bits.",
)
