"""Retrieval: statements hidden in a long text, asked for at its end, and whether they are answered.

The question ends the prompt, so it stands in the last tile of a prefill and the answer behind it:
nothing of the answer can steer a list.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condensate_ext.evaluate.forms import Form
from condensate_ext.evaluate.policies import Variant
from condensate_ext.evaluate.runs import Advance, greedy_tokens, prefill, share_of, silent
from condensate_ext.evaluate.text import leading_tokens

QUESTION = Form()
ANSWER_TOKENS = 6  # a space and five characters, should each be a token of its own


@dataclass(frozen=True)
class Needle:
    """A retrieval line hidden in a text, and its question."""

    words: str
    code: str

    @property
    def statement(self) -> str:
        return f"{self.beginning} {self.code}.\n"

    @property
    def beginning(self) -> str:
        """The statement up to the code."""
        return f"The secret code for {self.words} is"

    @property
    def question(self) -> str:
        return f"\nQuestion: What is the secret code for {self.words}? Answer:"


_WORDS = (  # separated by spaces
    "amber bridge candle canyon castle cobalt copper desert engine falcon forest frozen garden "
    "gentle golden harbor hidden island lantern marble meadow mirror narrow orange pepper purple "
    "quiet rapid river rocket silver stone summer tiger velvet violet walnut winter wooden yellow"
)
_CODE_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ23456789"


def make_needles(count: int, seed: int = 0) -> list[Needle]:
    """Needles that share no word and no first letter of their code: none can be mixed up."""
    words = _WORDS.split()
    if not 1 <= count <= len(words) // 2:
        raise ValueError(f"count must be 1 to {len(words) // 2}, not {count}: words are used once")
    generator = random.Random(seed)
    generator.shuffle(words)
    firsts = generator.sample(_CODE_ALPHABET, count)
    return [
        Needle(
            words=f"{words[2 * n]} {words[2 * n + 1]}",
            code=firsts[n] + "".join(generator.choices(_CODE_ALPHABET, k=4)),
        )
        for n in range(count)
    ]


def hide_needles(
    tokenizer: Any, text: str, needles: Sequence[Needle], tokens: int, max_distance: int
) -> list[int]:
    """The first ``tokens`` tokens of ``text`` with the statements spread over the last part of it.

    Statements stand at line ends, evenly spaced, at most ``max_distance`` tokens from the end and
    none in the last twelfth of that distance. The tokenizer's own first tokens come first.
    """
    begin = max(tokens - max_distance, 0)
    step = (tokens - begin) * 11 / 12 / len(needles)
    ids = leading_tokens(tokenizer)
    pending = list(needles)
    due = begin + step / 2
    for line in text.splitlines(keepends=True):
        if pending and len(ids) >= due:
            ids += tokenizer(pending.pop(0).statement, add_special_tokens=False).input_ids
            due += step
        ids += tokenizer(line, add_special_tokens=False).input_ids
        if len(ids) >= tokens:
            break
    if len(ids) < tokens:
        raise ValueError(f"the text has {len(ids)} tokens; {tokens} are needed: pass a longer text")
    if pending:
        raise ValueError(
            f"{len(pending)} of {len(needles)} statements found no line end among {tokens} tokens: "
            "hide fewer, or pass a text of shorter lines or a longer context"
        )
    return ids[:tokens]


@dataclass(frozen=True)
class Answer:
    """How one question was answered."""

    first: bool  # the first token that shows something of the code is the expected one
    whole: bool  # the answer begins with all five characters


@dataclass(frozen=True)
class _Prompt:
    ids: list[int]
    expected: list[int]  # tokens of the right answer
    code: str
    question: int  # tokens at the prompt's end that belong to the question


def _prompt(
    tokenizer: Any, document: Sequence[int], needle: Needle, tokens: int, form: Form = QUESTION
) -> _Prompt:
    """The document, shortened to leave room, and the question: ``tokens`` in all."""
    asked = form.asked(needle)
    question = tokenizer(asked, add_special_tokens=False).input_ids
    answered = tokenizer(asked + form.answer(needle), add_special_tokens=False).input_ids
    if answered[: len(question)] != question:
        raise ValueError("the tokenizer merges the question with its answer: use another form")
    ids = [*form.prompt(tokenizer, document, tokens - len(question)), *question]
    if len(ids) != tokens:
        raise ValueError(f"the document has {len(document)} tokens, {tokens} are needed")
    return _Prompt(ids, answered[len(question) :], needle.code, len(question))


def _generate(model: Any, prompts: list[_Prompt], variant: Variant, advance: Advance) -> Tensor:
    """``[questions, ANSWER_TOKENS]``: greedy answers, prefill and steps through the variant.

    Dense attention reads what the prompts share once. A policy reads every prompt whole, since the
    lists of its last tile depend on the question.
    """
    ids = torch.tensor([prompt.ids for prompt in prompts], device=model.device)
    cache = None
    if variant is None:
        shared = ids.shape[1] - max(prompt.question for prompt in prompts)
        cache = prefill(model, ids[:1, :shared])
        cache.batch_repeat_interleave(len(prompts))
        ids = ids[:, shared:]
    return greedy_tokens(model, ids, ANSWER_TOKENS, variant, cache=cache, advance=advance)


def _score(tokenizer: Any, prompt: _Prompt, tokens: list[int]) -> Answer:
    telling = 1  # some tokenizers make the space a token of its own
    while (
        telling < len(prompt.expected) and not tokenizer.decode(prompt.expected[:telling]).strip()
    ):
        telling += 1
    return Answer(
        first=tokens[:telling] == prompt.expected[:telling],
        whole=tokenizer.decode(tokens).strip().startswith(prompt.code),
    )


def ask_needles(
    model: Any,
    tokenizer: Any,
    document: Sequence[int],
    needles: Sequence[Needle],
    variant: Variant,
    prompt_tokens: int,
    *,
    form: Form = QUESTION,
    batch: int = 1,
    advance: Advance = silent,
) -> list[Answer]:
    """Asks for every needle, one prompt each, and scores the greedy answers.

    Each prompt is the document, shortened to leave room, and one question; it ends where the answer
    would begin. The whole prompt goes through the variant, then the answer is decoded through it,
    one query at a time.

    Args:
        model: a causal LM in eval mode.
        tokenizer: its tokenizer.
        document: token ids with the statements in them, from :func:`hide_needles`.
        needles: what is asked.
        variant: what the attention layers run.
        prompt_tokens: length of every prompt.
        form: how it is asked.
        batch: prompts at once.
        advance: told the progress.
    """
    prompts = [_prompt(tokenizer, document, needle, prompt_tokens, form) for needle in needles]
    groups = [prompts[begin : begin + batch] for begin in range(0, len(prompts), batch)]
    answers = []
    for group in groups:
        tokens = _generate(model, group, variant, share_of(advance, len(groups))).tolist()
        answers += [_score(tokenizer, *pair) for pair in zip(group, tokens, strict=True)]
    return answers
