"""Calls at once: threads, streams, forked and spawned processes, two devices."""

from __future__ import annotations

import multiprocessing
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch

from tools.scorecard.calls import OPS, Sizes, random_sizes, same
from tools.scorecard.line import Line, Piece, Tally

WORKERS = 8
CALLS = {"reduced": 20, "full": 125}  # of a worker in a piece, of each op


def run_threads(piece: Piece) -> Tally:
    """Every worker has tensors of its own, made beforehand, and compares every result."""
    tally, rng, generator = Tally(), piece.rng(), piece.generator()
    devices = [piece.device]
    if piece.device == "cuda":
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    work = []
    for worker in range(WORKERS):
        device = devices[worker % len(devices)]
        made = [(op, op.make(random_sizes(rng, 300), device, generator)) for op in OPS]
        work.append((device, [(op, arguments, op(arguments)) for op, arguments in made]))

    def go(worker: int) -> list[str]:
        device, calls = work[worker]
        on_cuda = device.startswith("cuda")
        wrong = []
        with torch.cuda.device(device) if on_cuda else nullcontext():
            stream = torch.cuda.Stream() if on_cuda else None
            with torch.cuda.stream(stream) if stream else nullcontext():
                for _ in range(CALLS[piece.size]):
                    for op, arguments, expected in calls:
                        if not same(op(arguments), expected):
                            wrong.append(f"{op.name} of worker {worker}")
        return wrong

    if piece.device == "cuda":
        torch.cuda.synchronize()
    with ThreadPoolExecutor(WORKERS) as pool:
        results = list(pool.map(go, range(WORKERS)))
    tally.count = WORKERS * CALLS[piece.size] * len(OPS)
    for wrong in results:
        for words in wrong:
            tally.fail(words)
    tally.add("workers", WORKERS)
    return tally


def _child(queue: Any, seed: int) -> None:
    torch.set_num_threads(1)
    queue.put([_sums(op_index, seed) for op_index in range(len(OPS))])


def _sums(op_index: int, seed: int) -> list[float]:
    op = OPS[op_index]
    arguments = op.make(Sizes(), "cpu", torch.Generator().manual_seed(seed))
    return [float(t.double().nan_to_num(neginf=-1.0).sum()) for t in op(arguments)]


def run_processes(piece: Piece) -> Tally:
    tally, seed = Tally(), piece.rng().randrange(2**31)
    torch.set_num_threads(1)  # torch's own pool does not outlive a fork
    expected = [_sums(op_index, seed) for op_index in range(len(OPS))]
    for method in ("fork", "spawn"):
        context: Any = multiprocessing.get_context(method)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            for _ in range(2):
                queue = context.Queue()
                child = context.Process(target=_child, args=(queue, seed))
                child.start()
                try:
                    tally.check(queue.get(timeout=120) == expected, f"{method}: other results")
                except Exception as error:
                    tally.check(False, f"{method}: {type(error).__name__}")
                child.join(timeout=60)
                tally.check(child.exitcode == 0, f"{method}: exit code {child.exitcode}")
    return tally


THREADS = Line(
    "threads and streams",
    "calls",
    "8 x 8 x 1,000, right",
    {"reduced": 1, "full": 8},
    run_threads,
    why="Eight threads, on CUDA each on a stream of its own and over all devices, every result "
    "compared with that of the same call alone.",
)
PROCESSES = Line(
    "fork and spawn",
    "checks",
    "right",
    {"reduced": 1, "full": 4},
    run_processes,
    devices=("cpu",),
    why="Forked and spawned children compute what the parent computed, and end well.",
)
