"""Decoding on a GPU: steps over paged caches against dense kernels, by replays of CUDA graphs.

`python -m bench.decode` writes bench/results/<card>/decode.json; `--cases NAME ...` measures some
cases, `--dry-run` needs no GPU and prints what would be measured.

A graph holds a step of every one of several caches, as of a model's layers, so that no step finds
its cache in L2; times are per step. total_ms is a step as a model makes it: the summaries of the
new tokens, selection, attention with the far field. update_ms, select_ms (lists alone) and
attend_ms (lists given, no far field) are parts of it as calls of their own, which together take
longer than a step. `bytes` is the least that a step must move, percent_of_copy_bandwidth its rate
against a large copy of the same run. `peer` is the fastest of torch's dense kernels, GQA both by
enable_gqa and with the heads of a group as query rows.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench import decode_peers, report
from bench.decode_cases import CASES, POOL_KEYS, DecodeCase
from bench.decode_inputs import Cache, contiguous, make_cache, num_sets, page_lists
from bench.report import Record
from bench.timing import Timed, interleaved_medians, measure_ceilings

if TYPE_CHECKING:
    from types import ModuleType

MIN_STEPS = 4  # of a graph
MILLISECONDS = 1500.0  # of a case, about
MAX_DIFFERENCE = 0.05  # of two 16-bit results of size 1 or so: the same keys, not the last bit
QUALITY = "decode_fidelity.json"  # beside this run's file: these settings on trained models


class DecodeRun:
    """One case on the GPU: its caches, and the parts of a step."""

    def __init__(self, case: DecodeCase, ops: ModuleType, l2_bytes: int) -> None:
        self.case = case
        self.ops = ops
        sets = num_sets(case.kv_bytes + case.summary_bytes, case.step_bytes, l2_bytes)
        self.caches = [self.with_summaries(make_cache(case, seed)) for seed in range(sets)]
        dense_sets = min(sets, num_sets(case.kv_bytes, case.kv_bytes, l2_bytes))
        self.dense_caches = self.caches[:dense_sets]
        self.steps = max(MIN_STEPS, sets)
        covered = case.kind == "dense"
        self.ranges = {"window": case.window, "anchors": case.anchors}
        width = case.max_pages * case.page_size if covered else case.shortlist
        self.budget = {"topk": case.topk, "shortlist": width}
        if case.kind == "given":
            self.lists = [self.given(seed) for seed in range(sets)]
        elif case.kind == "selected" and case.selects:  # for attention alone
            self.lists = [self.select(i) for i in range(sets)]

    def with_summaries(self, cache: Cache) -> Cache:
        if self.case.kind != "selected":
            return cache
        summaries = self.ops.KVSummaries.empty_for(cache.key, paged=True)
        made = replace(cache, summaries=summaries)
        self.update_all(made, self.case.n)
        return made

    @staticmethod
    def update_all(cache: Cache, appended: int) -> None:
        cache.summaries.update_(
            cache.key, cache.value, cache.lengths, appended=appended, **cache.paged()
        )

    def cache(self, i: int) -> Cache:
        return self.caches[i % len(self.caches)]

    def given(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        _, tokens = page_lists(self.case, seed)
        return tokens, torch.full_like(tokens[..., 0], self.case.topk)

    def update(self, i: int) -> None:
        self.update_all(self.cache(i), self.case.query_len)

    def select(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        c = self.cache(i)
        indices, counts = self.ops.select_tokens_with_kvcache(
            c.query, c.key, c.value, c.lengths, summaries=c.summaries,
            **c.paged(), **self.ranges, **self.budget,
        )  # fmt: skip
        return indices, counts

    def attend(self, i: int) -> torch.Tensor:
        c = self.cache(i)
        out = self.ops.token_sparse_attention_with_kvcache(
            c.query, c.key, c.value, c.lengths, *self.lists[i % len(self.caches)],
            **c.paged(), **self.ranges,
        )[0]  # fmt: skip
        assert isinstance(out, torch.Tensor)
        return out

    def step(self, i: int) -> torch.Tensor:
        c = self.cache(i)
        if c.summaries is not None:
            self.update(i)
        out = self.ops.attention_with_kvcache(
            c.query, c.key, c.value, c.lengths, summaries=c.summaries,
            **c.paged(), **self.ranges, **self.budget,
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        return out

    def parts(self) -> dict[str, Callable[[int], object]]:
        """What is timed of ours; "total" is the step."""
        if self.case.kind == "given":
            return {"total": self.attend, "attend": self.attend}
        if self.case.kind == "prefill":
            return {"total": self.prefill()}
        if self.caches[0].summaries is None:
            return {"total": self.step}
        parts: dict[str, Callable[[int], object]] = {"total": self.step, "update": self.update}
        if self.case.selects:
            parts |= {"select": self.select, "attend": self.attend}
        return parts

    def prefill(self) -> Callable[[int], object]:
        """A chunk of new tokens through attention(), over contiguous keys."""
        case = self.case
        keys = [
            (c.query, contiguous(case, c, c.key), contiguous(case, c, c.value))
            for c in self.dense_caches
        ]
        topk = case.topk // POOL_KEYS * POOL_KEYS
        return lambda i: self.ops.attention(*keys[i % len(keys)], topk=topk, **self.ranges)

    def peers(self) -> dict[str, Callable[[], decode_peers.Call]]:
        """Makers of the peers' calls."""
        case, caches = self.case, self.dense_caches
        calls = decode_peers.sdpa(case, caches)
        makers: dict[str, Callable[[], decode_peers.Call]] = {
            name: functools.partial(lambda call: call, call) for name, call in calls.items()
        }
        if case.kind == "given":
            makers[decode_peers.FLASHINFER_GIVEN] = functools.partial(
                decode_peers.flashinfer_given, case, self.caches
            )
        elif case.kind != "prefill":
            makers[decode_peers.FLASHINFER_DENSE] = functools.partial(
                decode_peers.flashinfer_dense, case, caches
            )
        return makers


def graph_of(function: Callable[[int], object], steps: int) -> Timed:
    """Replays of `steps` calls of the function, over sets 0, 1, 2, ..."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(0)  # what is made at a first call
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(steps):
            function(i)
    return lambda _: graph.replay()


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def check_same(run: DecodeRun, name: str, call: decode_peers.Call) -> None:
    """Raises when a peer computes something else than ours, where both attend the same keys."""
    ours: torch.Tensor | None = None
    if run.case.kind == "given" and name == decode_peers.FLASHINFER_GIVEN:
        ours = run.attend(0)
    elif run.case.kind == "dense":
        ours = run.step(0)
    if ours is None:
        return
    difference = (call(0).float() - ours.float()).abs().max().item()
    if not difference <= MAX_DIFFERENCE:
        raise RuntimeError(f"its output differs from ours by {difference:.3g}")


def timed_peers(run: DecodeRun) -> tuple[dict[str, Timed], list[str]]:
    """The peers that run on this case, and why the others do not."""
    timed, failures = {}, []
    for name, make in run.peers().items():
        try:
            call = make()
            call(0)
            check_same(run, name, call)
            timed[name] = graph_of(call, run.steps)
        except (RuntimeError, ValueError, TypeError) as error:
            failures.append(f"{run.case.name}/{name}: {first_line(error)}")
    return timed, failures


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def make_record(
    case: DecodeCase, ours: dict[str, float], peers: dict[str, float], failures: list[str],
    copy_tb_s: float,
) -> Record:  # fmt: skip
    """Milliseconds of a step, by part and by peer, put in relation."""
    dense = {name: t for name, t in peers.items() if name.startswith("sdpa_")}
    peer = min(dense, key=lambda name: dense[name])
    total = ours["total"]
    tb_s = case.step_bytes / total / 1e9
    return {
        "case": case.name,
        "kind": case.kind,
        "batch": case.batch,
        "n": case.n,
        "query_len": case.query_len,
        "heads": case.heads,
        "kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "page_size": case.page_size,
        "budget": case.budget,
        "shortlist": case.shortlist if case.selects else 0,
        "selection": "tokens" if case.selects else "given" if case.kind == "given" else "dense",
        "selection_included": case.kind != "given",
        "total_ms": rounded(total),
        "update_ms": rounded(ours.get("update")),
        "select_ms": rounded(ours.get("select")),
        "attend_ms": rounded(ours.get("attend")),
        "peer": peer,
        "peer_ms": rounded(dense[peer]),
        "speedup": round(dense[peer] / total, 2),
        "bytes": case.step_bytes,
        "gb_s": round(1000 * tb_s, 1),
        "percent_of_copy_bandwidth": round(100 * tb_s / copy_tb_s, 1),
        "memory_percent": round(100 * case.summary_bytes / case.kv_bytes, 2) if case.selects else 0,
        "quality_reference": QUALITY,
        "peers": {name: rounded(t) for name, t in peers.items()},
        "peers_failed": failures,
    }


def measure(case: DecodeCase, ops: ModuleType, copy_tb_s: float) -> Record:
    """Everything about one case, in one interleaved run."""
    run = DecodeRun(case, ops, torch.cuda.get_device_properties(0).L2_cache_size)
    peers, failures = timed_peers(run)
    ours = {name: graph_of(part, run.steps) for name, part in run.parts().items()}
    medians = {
        name: t / run.steps for name, t in interleaved_medians(ours | peers, MILLISECONDS).items()
    }
    of_ours = {name: medians[name] for name in ours}
    return make_record(case, of_ours, {name: medians[name] for name in peers}, failures, copy_tb_s)


def measure_all(cases: tuple[DecodeCase, ...], seconds: float) -> Record:
    """As many cases as the time allows, the most important first."""
    import condensate_ext

    started = time.monotonic()
    torch.set_grad_enabled(False)
    ceilings = measure_ceilings()
    records: list[Record] = []
    skipped: list[str] = []
    for case in cases:
        begun = time.monotonic()
        if begun - started > seconds:
            skipped.append(case.name)
            continue
        try:
            records.append(measure(case, condensate_ext, ceilings.copy_tb_s))
        except (RuntimeError, ValueError) as error:  # what a build cannot run, or no memory
            skipped.append(f"{case.name}: {first_line(error)}")
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # a kernel has failed: nothing runs in this process again
            skipped.append(f"all after {case.name}: {first_line(error)}")
            break
        print(f"{case.name}: {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
    return {
        "environment": report.environment(),
        "ceilings": {
            "copy_tb_s": round(ceilings.copy_tb_s, 3),
            "matmul_tflop_s": round(ceilings.matmul_tflop_s, 1),
        },
        "skipped": skipped,
        "records": records,
    }


def dry_run(cases: tuple[DecodeCase, ...]) -> None:
    """The cases and the bytes that each must move, without a GPU."""
    for case in cases:
        print(
            f"{case.name:32} window {case.window:4} anchors {case.anchors:3} topk {case.topk:5}  "
            f"step {case.step_bytes / 1e6:8.1f} MB  K and V {case.kv_bytes / 1e6:8.1f} MB  "
            f"summaries {case.summary_bytes / 1e6:7.1f} MB"
        )


def chosen(names: list[str] | None) -> tuple[DecodeCase, ...]:
    """Cases whose names hold one of these, or all."""
    if not names:
        return CASES
    cases = tuple(case for case in CASES if any(name in case.name for name in names))
    if not cases:
        raise SystemExit(f"--cases {' '.join(names)}: none of {', '.join(c.name for c in CASES)}")
    return cases


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", help="those whose names hold one of these")
    parser.add_argument(
        "--budget-seconds", type=float, default=150.0, help="skip cases beyond this"
    )
    parser.add_argument("--output", type=Path, default=report.results_folder() / "decode.json")
    parser.add_argument("--dry-run", action="store_true", help="print the cases and stop")
    options = parser.parse_args(arguments)
    cases = chosen(options.cases)
    if options.dry_run:
        dry_run(cases)
        return 0
    if not torch.cuda.is_available():
        print("bench.decode needs a CUDA device; --dry-run does not", file=sys.stderr)
        return 1
    document = measure_all(cases, options.budget_seconds)
    report.save(document, options.output, "decode")
    report.show_decode(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
