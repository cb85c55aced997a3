"""Prefill on a GPU: attention() and its stages against dense kernels and FlexAttention.

`python -m bench.prefill` writes bench/results/<card>/prefill.json; `--quick` measures one
case, `--dry-run` needs no GPU and prints what would be measured.

total_ms is one attention() call as users make it, selection and far field inside; forward_ms the
same by attention_forward(), which also estimates the omitted mass; support_ms one attention() call
without the far field; select_ms is block_summaries + select_blocks, attend_ms is
block_sparse_attention with the list given, far_attend_ms the same with the far field. TFLOP/s count
4 * n * b * heads * head_dim for the exact mean b of keys per query, nothing for selection and far
field. percent_of_floor is the attention's
floor (that arithmetic at this run's matmul rate, or Q, K, V and output at this run's copy rate)
over total_ms. `peer` is the faster of torch's dense kernels.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend

from bench import peers, report
from bench.cases import CASES, Case, Work, attention_work, dense_work, selection_work, summary_work
from bench.inputs import Inputs, given_lists, make_input_sets, mean_keys_per_query
from bench.report import Record
from bench.timing import Ceilings, Timed, extra_memory_bytes, interleaved_medians, measure_ceilings

if TYPE_CHECKING:
    from types import ModuleType

FLEX = "flex_same_lists"
LIST_STAGES = ("block_sparse_attention", "with far field")
WHOLE_STAGES = ("attention", "attention_forward", "attention without far field")
MAX_DIFFERENCE = 0.05  # of two 16-bit results of size 4 at most: the same mask, not the last bit
QUALITY = "fidelity.json"  # beside this run's file: these settings on a trained model


class CaseRun:
    """One case on the GPU: its inputs, lists, and everything that is timed on them."""

    def __init__(self, case: Case, ops: ModuleType) -> None:
        self.case = case
        self.ops = ops
        self.ranges = {"window": case.window, "anchors": case.anchors}
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self.sets = make_input_sets(case, l2_bytes)
        self.summaries = [ops.block_summaries(s.key) for s in self.sets]
        if case.given_lists:
            self.lists = [given_lists(case, seed) for seed in range(len(self.sets))]
        else:
            self.lists = [self.select(s, x) for s, x in zip(self.sets, self.summaries, strict=True)]

    def select(self, inputs: Inputs, summaries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        indices, counts = self.ops.select_blocks(
            inputs.query,
            summaries,
            kv_len=self.case.n,
            topk=self.case.topk,
            far_field=False,
            **self.ranges,
        )
        return indices, counts

    def attend(self, i: int, far_field: bool = False) -> torch.Tensor:
        inputs, (indices, counts) = self.sets[i], self.lists[i]
        out = self.ops.block_sparse_attention(
            inputs.query, inputs.key, inputs.value, indices, counts,
            far_field=far_field, **self.ranges,
        )[0]  # fmt: skip
        assert isinstance(out, torch.Tensor)
        return out

    def total(self, i: int, far_field: bool | None = None) -> torch.Tensor:
        inputs = self.sets[i]
        out = self.ops.attention(
            inputs.query, inputs.key, inputs.value,
            topk=self.case.topk, far_field=far_field, **self.ranges,
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        return out

    def forward(self, i: int) -> object:
        inputs = self.sets[i]
        return self.ops.attention_forward(
            inputs.query, inputs.key, inputs.value, topk=self.case.topk, **self.ranges
        )

    def rotating(self, function: Callable[[int], object]) -> Timed:
        return lambda round_number: function(round_number % len(self.sets))

    def stages(self) -> dict[str, Timed]:
        return {
            "block_summaries": self.rotating(lambda i: self.ops.block_summaries(self.sets[i].key)),
            "select_blocks": self.rotating(lambda i: self.select(self.sets[i], self.summaries[i])),
            "block_sparse_attention": self.rotating(self.attend),
            "with far field": self.rotating(lambda i: self.attend(i, far_field=True)),
            "attention": self.rotating(self.total),
            "attention_forward": self.rotating(self.forward),
            "attention without far field": self.rotating(lambda i: self.total(i, far_field=False)),
        }

    def flex(self) -> Timed:
        """FlexAttention on the same lists; raises when it does not compute the same."""
        case = self.case
        queries = [peers.pack_tiles(case, s.query) for s in self.sets]
        masks = [peers.flex_mask(case, *lists) for lists in self.lists]

        def run(i: int) -> torch.Tensor:
            return peers.flex(case, queries[i], self.sets[i], masks[i])

        theirs = peers.unpack_tiles(case, run(0))
        difference = (theirs - self.attend(0)).abs_().max().item()
        if not difference <= MAX_DIFFERENCE:
            raise RuntimeError(f"its output differs from ours by {difference:.3g}")
        return self.rotating(run)

    def dense(self, backend: SDPBackend) -> Timed:
        peers.dense(self.sets[0], backend)  # raises when this backend cannot take the shape
        return self.rotating(lambda i: peers.dense(self.sets[i], backend))

    def peers(self, with_flex: bool) -> tuple[dict[str, Timed], list[str]]:
        """The peers that run on this case, and why the others do not."""
        makers: dict[str, Callable[[], Timed]] = {
            name: functools.partial(self.dense, backend)
            for name, backend in peers.DENSE_BACKENDS.items()
        }
        if with_flex and self.case.flex:
            makers[FLEX] = self.flex
        timed, failures = {}, []
        for name, make in makers.items():
            try:
                timed[name] = make()
            except (RuntimeError, ValueError) as error:
                failures.append(f"{self.case.name}/{name}: {str(error).splitlines()[0]}")
        return timed, failures


def stage_works(case: Case, listed: float, attended: float) -> dict[str, Work]:
    """`listed` keys per query by the lists, `attended` by attention(), which may be dense."""
    works = {name: dense_work(case) for name in peers.DENSE_BACKENDS}
    works |= {"block_summaries": summary_work(case), "select_blocks": selection_work(case)}
    works |= dict.fromkeys((*LIST_STAGES, FLEX), attention_work(case, listed))
    works |= dict.fromkeys(WHOLE_STAGES, attention_work(case, attended))
    return works


def stage_record(name: str, ms: float, work: Work, ceilings: Ceilings) -> Record:
    return {
        "stage": name,
        "ms": round(ms, 4),
        "tflops": round(work.flops / ms / 1e9, 2),
        "gb_s": round(work.num_bytes / ms / 1e6, 1),
        "percent_of_floor": round(100 * ceilings.floor_ms(work) / ms, 1),
    }


def planned_selection(case: Case) -> str:
    """What attention() does with this case: "blocks", or "dense" where that is faster."""
    from condensate_ext import diagnostics

    return diagnostics.plan(
        batch=1, query_heads=case.heads, kv_heads=case.kv_heads, query_len=case.n, kv_len=case.n,
        head_dim=case.head_dim, dtype=getattr(torch, case.dtype), window=case.window,
        anchors=case.anchors, topk=case.topk, device="cuda",
    ).selection  # fmt: skip


def measure(case: Case, ops: ModuleType, ceilings: Ceilings, with_flex: bool) -> Record:
    """Everything about one case, in one interleaved run."""
    run = CaseRun(case, ops)
    timed_peers, failures = run.peers(with_flex)
    medians = interleaved_medians(run.stages() | timed_peers, 2000.0)
    selection = planned_selection(case)
    listed = mean_keys_per_query(case, *run.lists[0])
    keys_per_query = listed if selection == "blocks" else (case.n + 1) / 2
    works = stage_works(case, listed, keys_per_query)
    stages = [stage_record(name, t, works[name], ceilings) for name, t in medians.items()]
    dense_ms = {name: medians[name] for name in peers.DENSE_BACKENDS if name in medians}
    peer = min(dense_ms, key=lambda name: dense_ms[name])
    total, attend = medians["attention"], medians["block_sparse_attention"]
    return {
        "case": case.name,
        "n": case.n,
        "heads": case.heads,
        "kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "budget": case.budget,
        "keys_per_query": round(keys_per_query, 1),
        "selection": selection,
        "selection_included": True,
        "total_ms": round(total, 4),
        "select_ms": round(medians["block_summaries"] + medians["select_blocks"], 4),
        "forward_ms": round(medians["attention_forward"], 4),
        "support_ms": round(medians["attention without far field"], 4),
        "attend_ms": round(attend, 4),
        "far_attend_ms": round(medians["with far field"], 4),
        "peer": peer,
        "peer_ms": round(dense_ms[peer], 4),
        "speedup": round(dense_ms[peer] / total, 2),
        "attend_speedup": round(dense_ms[peer] / attend, 2),
        "tflops": round(works["attention"].flops / total / 1e9, 1),
        "percent_of_floor": round(100 * ceilings.floor_ms(works["attention"]) / total, 1),
        "memory_percent": round(100 * extra_memory_bytes(lambda: run.total(0)) / case.kv_bytes, 2),
        "quality_reference": QUALITY,
        "peers": {name: round(medians[name], 4) for name in timed_peers},
        "peers_failed": failures,
        "stages": stages,
    }


def expected_seconds(case: Case, measured: list[tuple[int, float]]) -> float:
    """By the (tokens, seconds) measured: a case takes no longer than one of as many tokens or more,
    and one that is longer than all of them as long as the slowest."""
    longer = [seconds for tokens, seconds in measured if tokens >= case.n]
    return min(longer) if longer else max((seconds for _, seconds in measured), default=0.0)


def measure_all(cases: tuple[Case, ...], seconds: float, with_flex: bool) -> Record:
    """As many cases as the time allows, the most important first."""
    import condensate_ext

    started = time.monotonic()
    torch.set_grad_enabled(False)
    ceilings = measure_ceilings()
    records: list[Record] = []
    skipped: list[str] = []
    measured: list[tuple[int, float]] = []
    for case in cases:
        begun = time.monotonic()
        if begun - started + expected_seconds(case, measured) > seconds:
            skipped.append(case.name)
            continue
        records.append(measure(case, condensate_ext, ceilings, with_flex))
        torch.cuda.empty_cache()
        measured.append((case.n, time.monotonic() - begun))
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


def dry_run(cases: tuple[Case, ...]) -> None:
    """The cases and the arithmetic that each must do, without a GPU."""
    for case in cases:
        attend, select = attention_work(case, case.budget), selection_work(case)
        print(
            f"{case.name:36} window {case.window:4} anchors {case.anchors:3} topk {case.topk:5}  "
            f"attend {attend.flops / 1e12:7.3f} TFLOP  select {select.flops / 1e12:7.3f} TFLOP  "
            f"dense {dense_work(case).flops / 1e12:8.2f} TFLOP"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the first case alone")
    parser.add_argument(
        "--no-flex", action="store_true", help="leave FlexAttention out (it compiles)"
    )
    parser.add_argument(
        "--budget-seconds", type=float, default=150.0, help="skip cases beyond this"
    )
    parser.add_argument("--output", type=Path, default=report.results_folder() / "prefill.json")
    parser.add_argument("--dry-run", action="store_true", help="print the cases and stop")
    options = parser.parse_args()
    cases = CASES[:1] if options.quick else CASES
    if options.dry_run:
        dry_run(cases)
        return 0
    if not torch.cuda.is_available():
        print("bench.prefill needs a CUDA device; --dry-run does not", file=sys.stderr)
        return 1
    document = measure_all(cases, options.budget_seconds, not options.no_flex)
    report.save(document, options.output)
    report.show(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
