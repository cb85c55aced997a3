"""``condensate evaluate``: a language model with condensate attention against itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from condensate_ext._selectors import SELECTORS
from condensate_ext.commands import console
from condensate_ext.commands.options import BATCH, CONTEXT, DEVICE, DTYPE, MODEL, TEXT, check_dtype
from condensate_ext.evaluate import page, report
from condensate_ext.evaluate.evaluation import PROTOCOLS, Evaluation, Settings
from condensate_ext.evaluate.forms import make_form
from condensate_ext.evaluate.subject import context_of, default_dtype, load
from condensate_ext.evaluate.tasks import GENERATED, open_tasks
from condensate_ext.model_checks import check_model
from condensate_ext.model_files import load_tokenizer

if TYPE_CHECKING:
    from rich.console import Console

_JSON, _HTML = "evaluation.json", "report.html"


def command(
    model: MODEL,
    text: TEXT,
    device: DEVICE = None,
    dtype: DTYPE = None,
    context: CONTEXT = None,
    documents: Annotated[int, typer.Option(help="Texts: windows of long ones if need be.")] = 4,
    budgets: Annotated[
        list[int], typer.Option(help="Keys per query in all: 64 anchors, a window of 256, ...")
    ] = [1024, 2048],  # noqa: B006
    selectors: Annotated[
        list[str], typer.Option(help=f"Of {', '.join(SELECTORS)}.")
    ] = ["block"],  # noqa: B006
    protocols: Annotated[
        list[str], typer.Option(help=f"Some of {', '.join(PROTOCOLS)}.")
    ] = list(PROTOCOLS),  # noqa: B006
    far_field: Annotated[
        bool | None,
        typer.Option("--far-field/--no-far-field", help="Pooled terms for what is not attended."),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Softmax mass at which a list ends. Default: none.")
    ] = None,
    shortlist: Annotated[
        int | None,
        typer.Option(
            help="Keys that a decoding step scores to find its tokens, or as many as it lists. "
            "Default: 4096. Contexts that it holds beside anchors and window are decoded densely."
        ),
    ] = None,
    decode_tokens: Annotated[int, typer.Option(help="Tokens of decode and prefill.")] = 512,
    needles: Annotated[int, typer.Option(help="Questions a document.")] = 12,
    new_tokens: Annotated[int, typer.Option(help="Tokens of a continuation.")] = 128,
    needle_form: Annotated[
        str, typer.Option(help="question, or statement: completing one, which more models do.")
    ] = "question",
    chat: Annotated[
        bool, typer.Option("--chat", help="Needles and tasks in the tokenizer's chat template.")
    ] = False,
    tasks: Annotated[
        list[str],
        typer.Option(help=f"Tasks of lm-eval; {', '.join(GENERATED)} need no network."),
    ] = [],  # noqa: B006
    task_limit: Annotated[int, typer.Option(help="Documents of a task.")] = 20,
    batch: BATCH = 4,
    output: Annotated[
        Path, typer.Option(help=f"Folder for {_JSON}, {_HTML} and pictures, or a .json file.")
    ] = Path("condensate_evaluation"),
) -> None:
    """Judges a language model.

    Compares it with itself under dense attention, by the real operators.

    decode: dense prefill of all but the last tokens, then those one query at a time through the
    policy (KL, top-1, perplexity). prefill: all but the last tokens through the policy, those
    densely over its cache. needles: statements spread over the prompt, the question at its end,
    all of it and the answer through the policy. survival: greedy continuations, tokens until they
    leave the dense one. omitted, steps: softmax mass left out, audited and estimated, in prefill
    and in decoding steps. Beside every figure stands dense attention, by another kernel where
    rounding matters.

    Wrong names, budgets and models end with status 2 before weights are read. Results are written
    after every protocol; Ctrl-C keeps them.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(
        model=model, text=text, device=device, dtype=dtype or default_dtype(device),
        context=context, documents=documents, batch=batch, selectors=tuple(selectors),
        budgets=tuple(budgets), protocols=tuple(protocols), far_field=far_field, top_p=top_p,
        shortlist=shortlist, decode_tokens=decode_tokens, needles=needles, new_tokens=new_tokens,
        needle_form=needle_form, chat=chat, tasks=tuple(tasks), task_limit=task_limit,
    )  # fmt: skip
    raise typer.Exit(run(settings, output))


def run(settings: Settings, output: Path) -> int:
    """Evaluates a model and returns the exit status."""
    try:
        console.need("evaluate", "transformers", *(["lm_eval"] if settings.tasks else []))
    except ImportError as error:
        print(error)
        return console.FAILED
    shown = console.console()
    try:
        evaluation = _prepare(settings)
    except (ValueError, NotImplementedError, ImportError) as error:
        return console.refuse("evaluate", error)
    try:
        _measure(evaluation, output)
    except KeyboardInterrupt:
        _show(evaluation, output, shown)
        done = f"{len(evaluation.seconds)} of {len(settings.steps())} protocols were measured"
        return console.interrupted("evaluate", done)
    _show(evaluation, output, shown)
    if json_path(output) != output:
        _write_page(evaluation, output, shown)
    return 0


def _write_page(evaluation: Evaluation, output: Path, shown: Console) -> None:
    pictures, missing = evaluation.draw(output)
    path = output / _HTML
    path.write_text(page.make(evaluation.document(), pictures), encoding="utf-8")
    named = [f"{caption}: {picture}" for caption, picture in pictures.items()]
    console.say(shown, *named, *missing, f"report: {path}")


def _prepare(settings: Settings) -> Evaluation:
    """Everything that can be refused is, cheapest first."""
    settings.check()
    check_dtype(settings.dtype)
    policies = settings.policies()
    if not settings.text.is_file():
        raise ValueError(f"--text {settings.text} is no file: give a text, documents apart by NUL.")
    dtype = getattr(torch, settings.dtype)
    config = check_model(settings.model, [], crops=True)
    tokens = context_of(settings.context, config, settings.device)
    settings.check_room(tokens)
    check_model(settings.model, policies, tokens=tokens, dtype=dtype, crops=True)
    tokenizer = load_tokenizer(settings.model)
    make_form(settings.needle_form, tokenizer, settings.chat)
    opened = open_tasks(settings.tasks, tokenizer, tokens) if settings.tasks else {}
    subject = load(
        settings.model, settings.text, context=settings.context, documents=settings.documents,
        batch=settings.batch, dtype=settings.dtype, device=settings.device,
    )  # fmt: skip
    return Evaluation(subject, settings, opened)


def _measure(evaluation: Evaluation, output: Path) -> None:
    names = evaluation.settings.steps()
    with console.progress("evaluate", names) as begin:
        for name in names:
            evaluation.run(name, begin(name))
            # Whatever ends a long run early, what it has measured stays.
            console.write_json(json_path(output), evaluation.document())


def json_path(output: Path) -> Path:
    return output if output.suffix == ".json" else output / _JSON


def _show(evaluation: Evaluation, output: Path, shown: Console) -> None:
    """Tables, and where the records are."""
    settings, subject = evaluation.settings, evaluation.subject
    texts = len(subject.windows)
    fewer = "" if texts == settings.documents else f" (--text has no {settings.documents})"
    console.say(
        shown,
        f"{settings.model.name}, {subject.context} tokens, {texts} texts{fewer}, "
        f"{settings.dtype} on {settings.device}: against dense attention",
    )
    for table in report.tables(evaluation.records):
        shown.print(table)
    for hint in report.hints(evaluation.records):
        shown.print(hint, markup=False)
    if evaluation.records:
        console.say(shown, f"records: {json_path(output)}")
