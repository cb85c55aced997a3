"""What a long-running process keeps: nothing."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import condensate_ext
import torch

from tools.scorecard.calls import OPS, Sizes
from tools.scorecard.line import Line, Piece, Tally

CALLS_OF_A_PIECE = {"reduced": 10_000, "full": 50_000}
ERRORS_OF_A_PIECE = {"reduced": 10_000, "full": 25_000}
SMALL = Sizes(batch=1, kv_heads=1, group=1, query_len=1, kv_len=130, head_dim=8)
MEBIBYTE = 2**20
BYTES_OF_A_CALL = 32  # a leak of so much would show in few calls


def _limit(calls: int) -> int:
    return min(MEBIBYTE, BYTES_OF_A_CALL * calls)


def resident_bytes(device: str) -> int:
    """Of the host, and what is taken of the device."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # free pages would hide what is added
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    if device != "cuda":
        return resident
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return resident + total - free


def _grown(device: str, body: Callable[[], None], calls: int) -> int:
    """Bytes that `calls` calls leave. Of five parts the one that grew most is not counted: in it an
    allocator settled, while a leak shows in each."""
    torch.set_num_threads(1)  # for calls so small
    grown = []
    for _ in range(5):
        before = resident_bytes(device)
        for _ in range(calls // 4):
            body()
        grown.append(resident_bytes(device) - before)
    return sum(sorted(grown)[:-1])


def run_calls(piece: Piece) -> Tally:
    """One op in a loop, and every ninth piece all of them in turn."""
    tally, calls = Tally(), CALLS_OF_A_PIECE[piece.size]
    made = [(op, op.make(SMALL, piece.device, piece.generator())) for op in OPS]
    chosen = piece.index % (len(OPS) + 1)
    loop = made[chosen : chosen + 1] or made

    def body() -> None:
        for op, arguments in loop:
            op(arguments)

    grown = _grown(piece.device, body, calls // len(loop))
    names = ", ".join(op.name for op, _ in loop)
    tally.count = calls
    tally.add("MiB kept", max(grown, 0) / MEBIBYTE)
    if grown >= _limit(calls):
        tally.fail(f"{grown} bytes more after {calls} calls of {names}")
    return tally


def run_errors(piece: Piece) -> Tally:
    tally, calls = Tally(), ERRORS_OF_A_PIECE[piece.size]
    query = torch.zeros(1, 1, 1, 8, device=piece.device)
    faults = ({"topk": 63}, {"window": -1}, {"selector": "none"}, {"scale": float("nan")})

    def body() -> None:
        for fault in faults:
            try:
                condensate_ext.attention(query, query, query, **fault)
            except ValueError:
                continue
            tally.fail(f"{fault} was accepted")

    grown = _grown(piece.device, body, calls // len(faults))
    tally.count = calls
    tally.add("MiB kept", max(grown, 0) / MEBIBYTE)
    if grown >= _limit(calls):
        tally.fail(f"{grown} bytes more after {calls} errors")
    return tally


CALLS = Line(
    "soak",
    "calls",
    "2,000,000, < 1 MiB growth",
    {"reduced": 9, "full": 45},
    run_calls,
    why="Each op by itself in a loop, and all in turn; resident memory of the host, on CUDA also "
    "what the device has in use.",
)
ERRORS = Line(
    "errors raised",
    "errors",
    "100,000, < 1 MiB growth",
    {"reduced": 1, "full": 4},
    run_errors,
    why="Refused calls in a loop, memory as above.",
)
