"""Marker probes at the edges of tiles, windows, anchors and blocks."""

from __future__ import annotations

from typing import Any

import condensate_ext
import torch

from tests.testkit import markers
from tests.testkit.cases import Case
from tests.testkit.definition import listed_blocks, support_of_lists, tile_positions
from tools.scorecard.line import Line, Piece, Tally

PROBES = {"reduced": 10_000, "full": 100_000}  # a piece, at least


def run(piece: Piece) -> Tally:
    tally, rng = Tally(), piece.rng()
    while tally.count < PROBES[piece.size]:
        group = rng.choice([1, 2, 3, 4, 8])
        case = Case(
            piece.device, rng.randrange(2**31), rng.choice([torch.float16, torch.bfloat16]),
            group=group, query_len=rng.choice([63, 64, 65, 129]), kv_len=rng.randint(130, 700),
            head_dim=128, window=rng.choice([0, 1, 17, 64, 65]), anchors=rng.choice([0, 3, 64, 65]),
            topk=64 * rng.choice([1, 3, 5]), causal=rng.random() < 0.7,
        )  # fmt: skip
        query, key, value = case.tensors()
        lists = case.lists()
        listed, _ = listed_blocks(*lists, case.kv_len)
        support = support_of_lists(case.ranges, listed, case.query_heads)
        positions = tile_positions(group)
        keys = torch.tensor(
            markers.edge_keys(case.query_len, case.kv_len, case.window, case.anchors, positions),
            device=piece.device,
        )
        silent = torch.zeros_like(query)
        options: dict[str, Any] = case.attention_args

        def attend(
            marked: torch.Tensor, query: torch.Tensor = silent, key: torch.Tensor = key,
            lists: tuple[torch.Tensor, ...] = lists, options: dict[str, Any] = options,
        ) -> torch.Tensor:  # fmt: skip
            return condensate_ext.block_sparse_attention(query, key, marked, *lists, **options)[0]

        found = markers.attended(attend, value, keys)
        wrong = int((found != support[..., keys]).sum())
        tally.count += found.numel()
        tally.failed += wrong
        if wrong:
            tally.failures.append(f"{wrong} probes of {case}")
    return tally


LINE = Line(
    "membership",
    "(row, key) pairs",
    "100,000, 0 wrong",
    {"reduced": 1, "full": 4},
    run,
    why="With queries of 0 and one-hot values an output element is nonzero exactly if its key was "
    "attended; keys stand at the edges of tiles, windows, anchors and blocks.",
)
