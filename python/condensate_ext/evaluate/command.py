"""``python -m condensate_ext evaluate``: a language model with condensate attention against itself
under dense attention, by the real operators.

Protocols:
  decode    dense prefill of all but the last tokens, then those one query at a time through the
            policy: KL, top-1 agreement, perplexity change
  needles   statements spread over the prompt, the question at its end, the whole prompt through the
            policy, the answer decoded through it
  prefill   all but the last tokens prefilled through the policy, those densely over its cache
  survival  greedy continuations: tokens until they leave the dense one, and how many never do
  omitted   softmax mass left out, audited and estimated, and each layer's output error, on rows of
            the last half of the text
  steps     the same of decoding steps: each row in a call of its own

Budgets are keys per query in all: 64 anchors, a window of 256, the rest selected. Decode, prefill
and survival also show dense attention by another kernel: what rounding alone does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from condensate_ext._selectors import SELECTORS
from condensate_ext.evaluate import omission, options, protocols, report
from condensate_ext.evaluate.omission import Audit
from condensate_ext.evaluate.policies import (
    ANCHORS,
    WINDOW,
    Policy,
    keys_per_query,
    selector_name,
)
from condensate_ext.evaluate.protocols import Record
from condensate_ext.evaluate.runs import Advance
from condensate_ext.evaluate.subject import Subject, default_dtype, load

if TYPE_CHECKING:
    from rich.console import Console

PROTOCOLS = ("decode", "needles", "prefill", "survival", "omitted", "steps")
_JSON = "evaluation.json"


class Evaluation:
    """A subject, the policies, and what was measured so far."""

    def __init__(self, subject: Subject, chosen: argparse.Namespace) -> None:
        for flag in ("decode_tokens", "new_tokens"):
            if getattr(chosen, flag) >= subject.context:
                raise ValueError(
                    f"--{flag.replace('_', '-')} {getattr(chosen, flag)} leaves nothing of "
                    f"--context {subject.context} before it: lower it or raise --context."
                )
        self.subject = subject
        self.chosen = chosen
        self.policies: list[Policy] = [
            options.make_policy(chosen, selector, keys)
            for selector in chosen.selectors
            for keys in chosen.budgets
        ]
        self.records: list[Record] = []
        self.audits: list[Audit] = []
        self.seconds: dict[str, float] = {}

    def run(self, name: str, advance: Advance) -> None:
        """Measures one protocol."""
        subject, policies, chosen = self.subject, self.policies, self.chosen
        began = time.perf_counter()
        match name:
            case "decode":
                found = protocols.decode(subject, policies, chosen.decode_tokens, advance)
            case "prefill":
                found = protocols.prefill(subject, policies, chosen.decode_tokens, advance)
            case "needles":
                found = protocols.needles(subject, policies, chosen.needles, advance=advance)
            case "survival":
                found = protocols.survive(subject, policies, chosen.new_tokens, advance)
            case "steps":
                found = protocols.steps(subject, policies, advance)
            case _:
                found, self.audits = protocols.omitted(subject, policies, advance)
        self.records += found
        self.seconds[name] = round(time.perf_counter() - began, 1)

    def document(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        chosen, device = self.chosen, torch.device(self.chosen.device)
        return {
            "environment": {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                **{name: version(name) for name in ("condensate_ext", "torch", "transformers")},
            },
            "settings": {
                "model": chosen.model.name,
                "text": chosen.text.name,
                "dtype": chosen.dtype,
                "context": self.subject.context,
                "documents": len(self.subject.windows),
                "window": WINDOW,
                "anchors": ANCHORS,
                "decode_tokens": chosen.decode_tokens,
                "needles": chosen.needles,
                "new_tokens": chosen.new_tokens,
            },
            "seconds": self.seconds,
            "records": self.records,
            "omitted": [
                {
                    "selector": selector_name(policy),
                    "keys": keys_per_query(policy),
                    "layers": omission.by_layer_and_head(audit),
                }
                for policy, audit in zip(self.policies, self.audits, strict=False)
            ],
        }

    def draw(self, folder: Path) -> list[str]:
        """Draws what was measured; returns a line for each picture and each that is missing."""
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return ["no pictures: they need matplotlib; `pip install matplotlib` adds it"]
        from condensate_ext.evaluate import plots

        paths = {name: folder / f"{name}.png" for name in ("quality", "omitted_mass", "support")}
        plots.quality(self.records, paths["quality"])
        lines = [f"quality against budget: {paths['quality']}"]
        if self.audits:
            plots.omitted_mass(self.audits, self.policies, paths["omitted_mass"])
            lines.append(f"omitted mass by layer and head: {paths['omitted_mass']}")
            name = self.chosen.model.name
            missing = plots.support(
                self.subject, name, self.audits, self.policies, paths["support"]
            )
            lines.append(missing or f"the head that leaves out most: {paths['support']}")
        return lines


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="condensate evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_subject(parser)
    parser.add_argument(
        "--context", type=int, help="tokens; default: 32768 on a GPU, 4096 on the CPU, if it fits"
    )
    parser.add_argument(
        "--documents", type=int, default=4, help="texts, windows of long documents if need be"
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=[1024, 2048], metavar="KEYS")
    parser.add_argument("--selectors", nargs="+", default=["block"], choices=SELECTORS)
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=PROTOCOLS)
    options.add_policy(parser)
    size = parser.add_argument_group("how much; time grows with it")
    size.add_argument("--decode-tokens", type=int, default=512, help="of decode and prefill")
    size.add_argument("--needles", type=int, default=12, help="questions a document")
    size.add_argument("--new-tokens", type=int, default=128, help="of survival")
    size.add_argument(
        "--batch", type=int, default=4, help="texts or prompts at once: memory grows with it"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("condensate_evaluation"),
        help=f"folder for {_JSON} and pictures, or a .json file",
    )
    chosen = parser.parse_args(arguments)
    for name in ("documents", "decode_tokens", "needles", "new_tokens", "batch"):
        if getattr(chosen, name) < 1:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} is {getattr(chosen, name)}: it must be at least 1")
    chosen.dtype = chosen.dtype or default_dtype(chosen.device)
    return chosen


def _evaluate(chosen: argparse.Namespace, console: Console) -> Evaluation:
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    subject = load(
        chosen.model,
        chosen.text,
        context=chosen.context,
        documents=chosen.documents,
        batch=chosen.batch,
        dtype=chosen.dtype,
        device=chosen.device,
    )
    evaluation = Evaluation(subject, chosen)
    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {name: progress.add_task(name, total=1, start=False) for name in chosen.protocols}
        for name, task in tasks.items():
            progress.start_task(task)
            evaluation.run(name, partial(progress.advance, task))
            progress.update(task, completed=1)  # shares add up to 1 but for rounding
            # Whatever ends a long run early, what it has measured stays.
            _json_path(chosen).write_text(
                json.dumps(evaluation.document(), indent=1) + "\n", encoding="utf-8"
            )
    return evaluation


def _json_path(chosen: argparse.Namespace) -> Path:
    output: Path = chosen.output
    return output if output.suffix == ".json" else output / _JSON


def _show(evaluation: Evaluation, console: Console) -> None:
    """Tables, pictures, and where everything is."""
    chosen, subject = evaluation.chosen, evaluation.subject
    texts = len(subject.windows)
    fewer = "" if texts == chosen.documents else f" (--text has no {chosen.documents})"
    console.print(
        f"{chosen.model.name}, {subject.context} tokens, {texts} texts{fewer}, {chosen.dtype} on "
        f"{chosen.device}: against dense attention",
        highlight=False,
    )
    for table in report.tables(evaluation.records):
        console.print(table)
    lines = [f"records: {_json_path(chosen)}"]
    if _json_path(chosen) != chosen.output:
        lines += evaluation.draw(chosen.output)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Evaluates a model and returns the exit status."""
    chosen = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        import rich  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        print(f"evaluate needs rich and transformers ({error}): `pip install {error.name}`.")
        return 1
    from rich.console import Console

    console = Console(width=max(110, Console().width))
    _json_path(chosen).parent.mkdir(parents=True, exist_ok=True)
    try:
        evaluation = _evaluate(chosen, console)
    except (ValueError, NotImplementedError) as error:
        print(f"condensate evaluate: {error}", file=sys.stderr)
        return 2
    _show(evaluation, console)
    return 0
