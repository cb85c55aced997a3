"""The demo's second half: a language model through the op, compared with itself."""

from __future__ import annotations

import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condensate_ext import evaluate
from condensate_ext._tables import make_table
from condensate_ext.commands import console
from condensate_ext.evaluate import Policy, covering, keys_per_query, policy
from condensate_ext.evaluate.subject import context_of
from condensate_ext.model_checks import check_model
from condensate_ext.model_files import load_causal_lm

_NEEDLE_DISTANCE = 24576  # tokens; farther than that small models fail densely too


def _default_text() -> str:
    """Sources of Python's own library: text that every machine has."""
    library = Path(sysconfig.get_path("stdlib"))
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py")))


def _read_text(path: Path | None) -> str:
    """The file's first document; NUL bytes separate documents."""
    return _default_text() if path is None else path.read_text(encoding="utf-8").split("\0")[0]


@dataclass(frozen=True)
class Options:
    """What the command line asks for; None stands for a default that depends on the device."""

    model: Path
    text: Path | None
    device: str
    dtype: str | None
    context: int | None
    keys: tuple[int, ...]
    selector: str
    decode: int | None
    new_tokens: int
    needles: int


class _Setup:
    """The model on its device, and as much text as the context holds."""

    def __init__(self, options: Options, policies: list[Policy]) -> None:
        gpu = torch.device(options.device).type == "cuda"
        dtype = options.dtype or ("bfloat16" if gpu else "float32")
        config = check_model(options.model, [], crops=True)
        self.context = context_of(options.context, config, options.device)
        check_model(
            options.model, policies, tokens=self.context, dtype=getattr(torch, dtype), crops=True
        )
        self.decode_tokens = options.decode or min(512 if gpu else 256, self.context // 4)
        self.text = _read_text(options.text)[: 16 * self.context]
        self.tokenizer, model = load_causal_lm(options.model, getattr(torch, dtype))
        self.model = model.to(options.device)
        ids = self.tokenizer(self.text, return_tensors="pt", add_special_tokens=False).input_ids
        if ids.shape[1] < self.context + 1:
            raise ValueError(
                f"--text has {ids.shape[1]} tokens, --context {self.context} needs one more than "
                f"that: give a longer text or --context {max(ids.shape[1] - 1, 0)}."
            )
        self.ids: Tensor = ids[:, : self.context + 1].to(options.device)
        self.title = f"{options.model.name}, {self.context} tokens, {dtype} on {options.device}"


def _fidelity_table(setup: _Setup, policies: list[Policy]) -> Any:
    """Prefill and decode of the text, each against dense attention."""
    headings = (
        "run, selector", "keys", "tokens compared", "top-1 agreement", "KL, nats",
        "perplexity, dense", "its change",
    )  # fmt: skip
    with console.progress("demo", ("decode", "prefill")) as begin:
        decoded = [
            result
            for (result,) in evaluate.compare_decode(
                setup.model, setup.ids, policies, setup.decode_tokens, begin("decode")
            )
        ]
        advance, prefilled = begin("prefill"), []
        for p in policies:
            prefilled.append(evaluate.compare_prefill(setup.model, setup.ids, p))
            advance(1 / len(policies))
    rows = [
        [
            f"{run}, {applied['selector']}",
            str(keys_per_query(applied)),
            str(result.tokens),
            f"{100 * result.top1:.1f} %",
            f"{result.kl:.4f}",
            f"{result.ppl_dense:.3f}",
            f"{result.dppl_percent:+.2f} %",
        ]
        for run, results in (("prefill", prefilled), ("decode", decoded))
        for applied, result in zip(policies, results, strict=True)
    ]
    return make_table(f"{setup.title}: against dense attention", headings, rows)


def _needle_lines(setup: _Setup, policies: list[Policy], count: int) -> list[str]:
    needles = evaluate.make_needles(count)
    distance = min(_NEEDLE_DISTANCE, setup.context)
    document = evaluate.hide_needles(setup.tokenizer, setup.text, needles, setup.context, distance)
    lines = []
    for applied in (None, *policies):
        answers = evaluate.ask_needles(
            setup.model, setup.tokenizer, document, needles, applied, setup.context
        )
        name = "dense" if applied is None else _name(applied)
        lines.append(f"  {name:<24}{sum(answer.first for answer in answers)} of {count}")
    return ["Needles, first answer token right, question in the last tile:", *lines]


def _name(applied: Policy) -> str:
    return f"{applied['selector']}, {keys_per_query(applied)} keys"


def _generation_lines(setup: _Setup, policies: list[Policy], new_tokens: int) -> list[str]:
    """Greedy continuations: prefill and every step through the op."""
    prompt = setup.ids[:, : setup.context - new_tokens]
    whole = covering(setup.context, policies[0]["selector"])
    runs: list[tuple[str, Policy | None]] = [("dense", None), ("budget >= context", whole)]
    runs += [(_name(applied), applied) for applied in policies]
    lines, dense = [], None
    for name, applied in runs:
        began = time.perf_counter()
        tokens = evaluate.greedy_tokens(setup.model, prompt, new_tokens, applied)
        seconds = time.perf_counter() - began
        dense = tokens if dense is None else dense
        (identical,) = evaluate.identical_prefix(dense, tokens)
        text = setup.tokenizer.decode(tokens[0, :16])
        lines.append(f"  {name:<24}{identical:>4} of {new_tokens}  {seconds:6.1f} s  {text!r}")
    return ["Greedy continuation, tokens identical to dense before the first difference:", *lines]


def run(options: Options) -> int:
    """Everything about one model; returns the exit status.

    Raises:
        ValueError: the model, a policy, the context or the text does not do.
    """
    policies = [policy(options.selector, keys) for keys in options.keys]
    setup = _Setup(options, policies)
    shown = console.console()
    try:
        shown.print(_fidelity_table(setup, policies))
        console.say(shown, *_generation_lines(setup, policies, options.new_tokens))
        if options.needles:
            console.say(shown, *_needle_lines(setup, policies, options.needles))
    except KeyboardInterrupt:
        return console.interrupted("demo", "what was measured is printed above")
    return 0
