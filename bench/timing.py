"""Interleaved GPU timing, measured ceilings, peak memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from bench.cases import Work

# The GPU idles this long before each timed call, so that the host is ahead of it and launch
# latency stays out of the figure: about 0.1 ms at 2 GHz.
HEAD_START_CYCLES = 200_000
MIN_ROUNDS, MAX_ROUNDS = 5, 50

Timed = Callable[[int], object]  # takes the round's number, to rotate its inputs


def time_once(function: Timed, round_number: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    function(round_number)
    end.record()
    return start, end


def interleaved_medians(functions: Mapping[str, Timed], milliseconds: float) -> dict[str, float]:
    """Median milliseconds of each function, run in turn so that clocks and heat are shared.

    Two warm-up rounds come first. Takes about `milliseconds` in all, but never fewer than
    MIN_ROUNDS rounds; a function that takes half of `milliseconds` alone is not called again after
    the warm-up, whose second time is its result.
    """
    pilot: dict[str, float] = {}
    for round_number in range(2):
        events = {name: time_once(function, round_number) for name, function in functions.items()}
        torch.cuda.synchronize()
        pilot = {name: start.elapsed_time(end) for name, (start, end) in events.items()}
    repeated = {name: f for name, f in functions.items() if pilot[name] < milliseconds / 2}
    round_ms = max(sum(pilot[name] for name in repeated), 1e-3)
    rounds = round(min(MAX_ROUNDS, max(MIN_ROUNDS, milliseconds / round_ms)))
    events_of: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
    for round_number in range(rounds):
        for name, function in repeated.items():
            events_of.setdefault(name, []).append(time_once(function, round_number))
    torch.cuda.synchronize()
    return pilot | {
        name: statistics.median(start.elapsed_time(end) for start, end in events)
        for name, events in events_of.items()
    }


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches on plain work, measured in the same run."""

    copy_tb_s: float
    matmul_tflop_s: float

    def floor_ms(self, work: Work) -> float:
        """No version of this work runs much faster."""
        compute = work.flops / (self.matmul_tflop_s * 1e9)
        memory = work.num_bytes / (self.copy_tb_s * 1e9)
        return max(compute, memory)


def measure_ceilings(milliseconds: float = 500.0) -> Ceilings:
    """A large copy (bytes read plus written) and a large bf16 product of random matrices."""
    source = torch.randn(512 * 1024 * 1024, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    medians = interleaved_medians(
        {"copy": lambda _: target.copy_(source), "matmul": lambda _: a @ b}, milliseconds
    )
    copied = 2 * source.numel() * source.element_size()
    return Ceilings(copied / medians["copy"] / 1e9, 2 * size**3 / medians["matmul"] / 1e9)


def extra_memory_bytes(function: Callable[[], torch.Tensor]) -> int:
    """Peak device memory of a call beyond what was allocated before it and its output."""
    function()  # workspaces that stay are made by the first call
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return peak - before - out.numel() * out.element_size()
