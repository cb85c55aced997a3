"""Tasks of lm-eval through the hook, dense and under each policy."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condensate_ext.evaluate.intervals import mean_interval
from condensate_ext.evaluate.policies import Policy, Variant
from condensate_ext.evaluate.protocols import Record, record
from condensate_ext.evaluate.runs import Advance, attended, share_of, silent
from condensate_ext.evaluate.subject import Subject

PREFIX = "task "
# Made from random numbers and words, without a network, in the whole context.
GENERATED = ("niah_single_1", "ruler_vt", "ruler_cwe", "ruler_fwe")


@dataclass(frozen=True)
class Scores:
    """One score a document, 0 to 1 for RULER's tasks."""

    metric: str
    values: list[float]


def open_tasks(names: Sequence[str], tokenizer: Any, context: int) -> dict[str, Any]:
    """lm-eval's tasks by name, with their data; generated ones are ``context`` tokens long.

    Raises:
        ImportError: lm-eval or what a task needs is not installed.
        ValueError: the tokenizer has no token that ends a text, a name is unknown, or
            a task's data is not at hand.
    """
    if tokenizer.eos_token is None:
        raise ValueError(
            "--tasks: the tokenizer has no token that ends a text, which lm-eval needs; set its "
            "eos_token."
        )
    # Before the libraries read them: nothing is fetched that is not at hand.
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
    import lm_eval.tasks

    get_task_dict = lm_eval.tasks.get_task_dict
    ruler = Path(lm_eval.tasks.__file__).parent / "ruler"
    # Reading the index of all tasks takes longer than RULER's take to be made.
    alone = {"include_path": str(ruler), "include_defaults": False}
    where: dict[str, Any] = alone if set(names) <= set(GENERATED) else {}
    with tempfile.TemporaryDirectory() as folder:
        # RULER's tasks open a tokenizer by name, and would run code that came with the model's.
        tokenizer.save_pretrained(folder)
        metadata = {"tokenizer": folder, "max_seq_lengths": [context]}
        manager = lm_eval.tasks.TaskManager(metadata=metadata, **where)
        found: dict[str, Any] = {}
        for name in names:
            if name not in manager.all_tasks:
                raise ValueError(
                    f"--tasks {name} is no task of lm-eval; `lm-eval ls tasks` lists them."
                )
            try:
                found.update(get_task_dict([name], manager))
            except ImportError:
                raise
            except Exception as error:  # data sets fail in many ways
                raise ValueError(
                    f"--tasks {name}: its data is not at hand ({type(error).__name__}: "
                    f"{str(error).splitlines()[0] if str(error) else 'no reason given'}); without "
                    f"a network use {', '.join(GENERATED)}."
                ) from error
    return found


def _scores(results: dict[str, Any], name: str, context: int) -> Scores:
    samples = results["samples"][name]
    own = str(context)  # RULER's metric is called as the length
    metric = own if all(own in sample for sample in samples) else samples[0]["metrics"][0]
    return Scores(metric, [float(sample[metric]) for sample in samples])


def score(
    subject: Subject, tasks: dict[str, Any], variant: Variant, limit: int, chat: bool = False
) -> dict[str, Scores]:
    """Every task's scores, its first ``limit`` documents through the variant."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    language_model = HFLM(
        pretrained=subject.model,
        tokenizer=subject.tokenizer,
        backend="causal",
        batch_size=1,  # more would pad
        max_length=subject.context,
    )
    with attended(subject.model, variant):
        results = evaluate(
            lm=language_model,
            task_dict=tasks,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat,
        )
    return {name: _scores(results, name, subject.context) for name in tasks}


def run(
    subject: Subject,
    tasks: dict[str, Any],
    policies: Sequence[Policy],
    limit: int,
    *,
    chat: bool = False,
    advance: Advance = silent,
) -> list[Record]:
    """Dense attention and each policy on each opened task; ``score`` is the mean over documents.

    ``score_low`` to ``score_high`` is its 95 % interval over documents like these.
    """
    variants: list[Variant] = [None, *policies]
    part = share_of(advance, len(variants))
    records = []
    for variant in variants:
        for name, scores in score(subject, tasks, variant, limit, chat).items():
            interval = mean_interval(scores.values) or (None, None)
            records.append(
                record(
                    PREFIX + name, variant,
                    score=sum(scores.values) / len(scores.values),
                    score_low=interval[0], score_high=interval[1],
                    documents=len(scores.values), tokens=len(scores.values),
                )
            )  # fmt: skip
        part(1)
    names = list(tasks)
    return sorted(records, key=lambda r: names.index(r["protocol"].removeprefix(PREFIX)))
