"""CUDA graphs: captured once, replayed on other contents."""

from __future__ import annotations

import torch

from tools.scorecard.calls import OPS, random_sizes, same, tensors_of
from tools.scorecard.line import Line, Piece, Tally

REPLAYS = 4


def run(piece: Piece) -> Tally:
    tally, rng, generator = Tally(), piece.rng(), piece.generator()
    for op in OPS:
        sizes = random_sizes(rng)
        static = op.make(sizes, piece.device, generator)
        op(static)  # loads kernels, which a capture must not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = op(static)
        for _ in range(REPLAYS):
            fresh = op.make(sizes, piece.device, generator)
            for name, tensor in tensors_of(static).items():
                tensor.copy_(fresh[name])
            graph.replay()
            torch.cuda.synchronize()
            tally.check(same(captured, op(fresh)), f"{op.name}: {sizes}")
        tally.add("captures", 1)
    return tally


LINE = Line(
    "CUDA graphs",
    "replays",
    "256 captures x 4, right",
    {"reduced": 1, "full": 32},
    run,
    devices=("cuda",),
    why="Each op captured once and replayed with other values in the same memory, against the op "
    "itself on them.",
)
