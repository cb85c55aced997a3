"""``condensate generate``: a model's text, dense and condensed side by side."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from condensate_ext._tables import WIDTH, make_table
from condensate_ext.commands import console
from condensate_ext.commands.options import DEVICE, DTYPE, MODEL, check_dtype
from condensate_ext.evaluate.policies import Policy, Variant, keys_per_query, policy
from condensate_ext.evaluate.runs import attended, feed, new_cache
from condensate_ext.evaluate.subject import default_dtype
from condensate_ext.evaluate.survival import identical_prefix
from condensate_ext.model_checks import check_model
from condensate_ext.model_files import load_causal_lm, load_tokenizer

_COLUMN = WIDTH // 2 - 2


@dataclass(frozen=True)
class Run:
    """A greedy continuation and what it took."""

    tokens: list[int]
    prefill_seconds: float
    decode_seconds: float  # of the tokens behind the first

    @property
    def tokens_per_second(self) -> float:
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 else 0.0


@torch.no_grad()
def continue_greedily(
    model: Any,
    ids: Tensor,
    new_tokens: int,
    variant: Variant,
    ends: frozenset[int],
    advance: Callable[[float], None],
) -> Run:
    """``new_tokens`` tokens behind the prompt ``[1, n]``, or up to the first of ``ends``."""
    tokens: list[int] = []
    cache = new_cache(model)
    began = time.perf_counter()
    with attended(model, variant):
        logits = feed(model, ids, cache, logits_to_keep=1).logits
        tokens.append(int(logits[0, -1].argmax()))
        prefilled = time.perf_counter()
        while len(tokens) < new_tokens and tokens[-1] not in ends:
            advance(1 / new_tokens)
            token = torch.tensor([tokens[-1:]], device=ids.device)
            tokens.append(int(feed(model, token, cache).logits[0, -1].argmax()))
    advance(1 - (len(tokens) - 1) / new_tokens)
    return Run(tokens, prefilled - began, time.perf_counter() - prefilled)


def _ends(model: Any) -> frozenset[int]:
    """Tokens that end a text, as the model's generation settings say."""
    ends = model.generation_config.eos_token_id
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)


def prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """The prompt ``[1, n]``, with ``chat`` as a user's turn in the tokenizer's template.

    Raises:
        ValueError: the tokenizer has no template, or the prompt no token.
    """
    if chat:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("--chat: the tokenizer has no chat template; leave --chat out.")
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    else:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise ValueError("--prompt has no token: give some text.")
    return ids


def _first_difference(dense: Run, ours: Run) -> str:
    shared = min(len(dense.tokens), len(ours.tokens))
    (same,) = identical_prefix(
        torch.tensor([dense.tokens[:shared]]), torch.tensor([ours.tokens[:shared]])
    )
    if same == shared and len(dense.tokens) == len(ours.tokens):
        return f"all {same} tokens are identical"
    return f"the first {same} tokens are identical, token {same + 1} differs"


def command(
    model: MODEL,
    prompt: Annotated[str | None, typer.Option(help="What is continued.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A file of it instead; - reads standard input.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask it as a user's turn, in the chat template.")
    ] = False,
    budget: Annotated[int, typer.Option(help="Keys per query in all.")] = 1024,
    selector: Annotated[str, typer.Option(help="How keys are selected.")] = "block",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate, at most.")] = 64,
    device: DEVICE = None,
    dtype: DTYPE = None,
) -> None:
    """Continues a prompt.

    Greedily, densely and through condensate, side by side. Shows
    both texts, the time of prefill, tokens per second, and the first token that differs.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        console.need("generate", "transformers")
    except ImportError as error:
        print(error)
        raise typer.Exit(console.FAILED) from None
    try:
        dtype = dtype or default_dtype(device)
        check_dtype(dtype)
        if new_tokens < 1:
            raise ValueError(f"--new-tokens is {new_tokens}: it must be at least 1.")
        chosen = policy(selector, budget)
        config = check_model(model, [chosen], dtype=getattr(torch, dtype))
        said = _read_prompt(prompt, prompt_file)
        ids = prompt_ids(load_tokenizer(model), said, chat).to(device)
        _check_room(config, ids.shape[1], new_tokens)
        tokenizer, loaded = load_causal_lm(model, getattr(torch, dtype))
    except (ValueError, NotImplementedError, OSError) as error:
        raise typer.Exit(console.refuse("generate", error)) from None
    raise typer.Exit(_compare(tokenizer, loaded.to(device), ids, chosen, new_tokens))


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise ValueError("give --prompt TEXT or --prompt-file FILE, one of them.")
    if file is None:
        return prompt or ""
    return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")


def _check_room(config: Any, tokens: int, new_tokens: int) -> None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens + new_tokens > limit:
        raise ValueError(
            f"the prompt has {tokens} tokens and --new-tokens {new_tokens}, more than the {limit} "
            "positions of this model: give a shorter prompt or generate less."
        )


def _compare(tokenizer: Any, model: Any, ids: Tensor, chosen: Policy, new_tokens: int) -> int:
    shown = console.console()
    runs: dict[str, Run] = {}
    name = f"{chosen['selector']}, {keys_per_query(chosen)} keys"
    try:
        with console.progress("generate", ("dense", name)) as begin:
            for title, variant in (("dense", None), (name, chosen)):
                ended = _ends(model)
                runs[title] = continue_greedily(
                    model, ids, new_tokens, variant, ended, begin(title)
                )
    except KeyboardInterrupt:
        for title, run in runs.items():
            console.say(shown, f"{title}: {tokenizer.decode(run.tokens)}")
        return console.interrupted("generate", "what was generated is printed above")
    texts = [tokenizer.decode(run.tokens) for run in runs.values()]
    shown.print(_side_by_side(list(runs), texts))
    rows = [
        [
            title,
            str(len(run.tokens)),
            f"{run.prefill_seconds:.2f}",
            f"{run.tokens_per_second:.1f}",
        ]
        for title, run in runs.items()
    ]
    headings = ("attention", "tokens", "prefill, s", "then tokens/s")
    shown.print(make_table(f"behind a prompt of {ids.shape[1]} tokens", headings, rows))
    console.say(shown, _first_difference(*runs.values()))
    if ids.shape[1] + new_tokens <= keys_per_query(chosen):
        console.say(shown, "The budget covers prompt and answer, so nothing was left out.")
    return 0


def _side_by_side(titles: list[str], texts: list[str]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(title, width=_COLUMN, overflow="fold")
    table.add_row(*map(Text, texts))
    return table
