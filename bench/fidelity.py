"""Quality on a trained model: `python -m bench.fidelity --model DIR --text FILE`.

Writes bench/results/<card>/fidelity.json, one record a protocol, selector and budget. The protocols
are those of `python -m condensate_ext evaluate` and share its code (`condensate_ext.evaluate`);
this module says which policies the project reports, and adds

greedy    a budget that covers the context, in the run's dtype and in float32, where rounding cannot
          turn a near-tie: how many tokens of the greedy continuation are identical to dense.

The text holds documents separated by NUL; of long ones several windows are taken. Statements of
the needles lie within --needle-distance tokens of the prompt's end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from condensate_ext.evaluate import covering, options, protocols, survival
from condensate_ext.evaluate import report as tables
from condensate_ext.evaluate.policies import ANCHORS, WINDOW, Policy, effective
from condensate_ext.evaluate.protocols import Record
from condensate_ext.evaluate.subject import Subject, default_dtype, load
from rich.console import Console

from bench import report


class Case(NamedTuple):
    selector: str
    keys: int
    far_field: bool = True  # else without one; `exact` has none
    top_p: float | None = None


DECODE = [
    Case("block", 2048), Case("block", 2048, far_field=False), Case("block", 4096),
    Case("exact", 2048), Case("block", 6144, top_p=0.2),  # README says how many on average
]  # fmt: skip
NEEDLES = [Case("block", 1024), Case("block", 2048), Case("block", 2048, far_field=False)]
PREFILL = [Case("block", 2048), Case("block", 2048, far_field=False)]
OMITTED = [Case("block", 2048)]
SURVIVAL = [Case("block", 4096)]

DECODE_TOKENS = 512
QUESTIONS = 12  # a document
SURVIVAL_TOKENS = 128
GREEDY_TOKENS = 64
# torch's dense float32 attention keeps a score matrix for grouped heads; chunks keep it small.
FLOAT32_CHUNK = 4096


class Run:
    """A subject, and one method a protocol."""

    def __init__(self, subject: Subject, chosen: argparse.Namespace) -> None:
        self.subject, self.chosen = subject, chosen

    def policies(self, cases: list[Case]) -> list[Policy]:
        return [
            options.make_policy(self.chosen, case.selector, case.keys)
            | ({} if case.far_field else {"far_field": False})
            | ({} if case.top_p is None else {"top_p": case.top_p})
            for case in cases
        ]

    def decode(self) -> list[Record]:
        return protocols.decode(self.subject, self.policies(DECODE), self.chosen.decode_tokens)

    def needles(self) -> list[Record]:
        return protocols.needles(
            self.subject, self.policies(NEEDLES), QUESTIONS, self.chosen.needle_distance
        )

    def prefill(self) -> list[Record]:
        return protocols.prefill(self.subject, self.policies(PREFILL), self.chosen.decode_tokens)

    def omitted(self) -> list[Record]:
        records, _ = protocols.omitted(self.subject, self.policies(OMITTED))
        return records

    def steps(self) -> list[Record]:
        return protocols.steps(self.subject, self.policies(OMITTED))

    def survival(self) -> list[Record]:
        return protocols.survive(self.subject, self.policies(SURVIVAL), SURVIVAL_TOKENS)

    def greedy(self) -> list[Record]:
        subject, dtype = self.subject, self.subject.model.dtype
        ids = subject.ids(subject.windows[:1], subject.context - GREEDY_TOKENS)
        records = []
        for other in dict.fromkeys((dtype, torch.float32)):
            subject.model.to(other)
            chunk = FLOAT32_CHUNK if other == torch.float32 else None
            policy = covering(subject.context)
            (counts,) = survival.compare_continuations(
                subject.model, ids, [policy], GREEDY_TOKENS, prefill_chunk=chunk
            )
            name = f"greedy, {str(other).removeprefix('torch.')}"
            values = survival.summary(counts, GREEDY_TOKENS)
            records.append({**protocols.record(name, policy, **values), "keys": subject.context})
        subject.model.to(dtype)
        return records


PROTOCOLS: dict[str, Callable[[Run], list[Record]]] = {
    "decode": Run.decode,
    "needles": Run.needles,
    "prefill": Run.prefill,
    "omitted": Run.omitted,
    "steps": Run.steps,
    "survival": Run.survival,
    "greedy": Run.greedy,
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.fidelity", description=__doc__)
    options.add_subject(parser)
    options.add_policy(parser)
    parser.add_argument("--context", type=int, default=32768, help="tokens")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--decode-tokens", type=int, default=DECODE_TOKENS)
    parser.add_argument("--needle-distance", type=int, default=24576, help="tokens")
    parser.add_argument("--only", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS))
    parser.add_argument("--output", type=Path, default=report.results_folder() / "fidelity.json")
    chosen = parser.parse_args(arguments)
    chosen.dtype = chosen.dtype or default_dtype(chosen.device)
    return chosen


def make_run(chosen: argparse.Namespace) -> Run:
    """Loads everything; all documents go through the model at once, as a step costs the same."""
    subject = load(
        chosen.model, chosen.text, context=chosen.context, documents=chosen.documents,
        batch=chosen.documents, dtype=chosen.dtype, device=chosen.device,
    )  # fmt: skip
    if len(subject.windows) < chosen.documents:
        raise SystemExit(
            f"--text {chosen.text} has {len(subject.windows)} windows of {chosen.context + 1} "
            f"tokens, --documents {chosen.documents} are asked for: give a longer text."
        )
    return Run(subject, chosen)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    run = make_run(chosen)
    settings = {
        "model": chosen.model.name, "text": chosen.text.name, "context": chosen.context,
        "dtype": chosen.dtype, "window": WINDOW, "anchors": ANCHORS,
        "far_field": effective(run.policies(DECODE)[0], "far_field"),
        "needle_distance": chosen.needle_distance,
    }  # fmt: skip
    records: list[Record] = []
    seconds: dict[str, float] = {}
    document = {
        "environment": report.environment(), "settings": settings, "seconds": seconds,
        "records": records,
    }  # fmt: skip
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    for name in chosen.only:
        began = time.perf_counter()
        records += PROTOCOLS[name](run)
        seconds[name] = round(time.perf_counter() - began, 1)
        print(f"{name}: {seconds[name]} s", flush=True)
        chosen.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console = Console(width=140)
    for table in tables.tables(records):
        console.print(table)
    print(f"written to {chosen.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
