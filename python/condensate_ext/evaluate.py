"""How close a language model with condensate attention stays to itself with dense attention.

Every function takes a transformers causal LM in eval mode and token ids ``[1, n]`` on its device,
and a policy: keyword arguments of :func:`condensate_ext.attention`. Scores are per token.

A tile of queries shares one list, so in prefill a row's list can depend on later queries of its
tile. :func:`compare_decode`, one query at a time, has no such dependence; :func:`ask_needles` puts
the question into the last tile and the answer behind it, so nothing of the answer can steer a list.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condensate_ext.hf import condensed_attention

_CHUNK = 1024  # tokens whose logits are held at once: logits of a whole prompt would be gigabytes

Policy = dict[str, Any]


@dataclass(frozen=True)
class Fidelity:
    """Next-token distributions against dense attention, averaged over ``tokens`` positions."""

    kl: float  # nats, KL(dense || condensed)
    top1: float  # share of positions with the same most likely token
    dppl_percent: float  # change of perplexity
    ppl_dense: float
    tokens: int


class _Comparison:
    """Sums up positions, on the device and in float64, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, dense_logits: Tensor, logits: Tensor, targets: Tensor) -> None:
        dense = dense_logits.float().log_softmax(-1)
        ours = logits.float().log_softmax(-1)
        rows = [
            (dense.exp() * (dense - ours)).sum(-1),
            (dense.argmax(-1) == ours.argmax(-1)).float(),
            -dense.gather(-1, targets[:, None])[:, 0],
            -ours.gather(-1, targets[:, None])[:, 0],
        ]
        self.sums += torch.stack(rows).double().sum(-1)
        self.tokens += len(targets)

    def result(self) -> Fidelity:
        kl, top1, nll_dense, nll = (self.sums / max(self.tokens, 1)).tolist()
        return Fidelity(
            kl=kl,
            top1=top1,
            dppl_percent=100 * (torch.tensor(nll - nll_dense).exp().item() - 1),
            ppl_dense=torch.tensor(nll_dense).exp().item(),
            tokens=self.tokens,
        )


def _context(model: Any, policy: Policy | None) -> Any:
    return nullcontext() if policy is None else condensed_attention(model, **policy)


@torch.no_grad()
def prefill(model: Any, ids: Tensor, policy: Policy | None = None) -> Any:
    """Fills a fresh cache with ``ids`` and returns it; no logits are computed."""
    with _context(model, policy):
        return model.base_model(input_ids=ids, use_cache=True).past_key_values


def _chunks(hidden: Tensor) -> Iterator[slice]:
    for begin in range(0, hidden.shape[0], _CHUNK):
        yield slice(begin, min(begin + _CHUNK, hidden.shape[0]))


@torch.no_grad()
def compare_prefill(model: Any, ids: Tensor, policy: Policy) -> Fidelity:
    """The whole text in one prefill, dense and condensed; every next token is compared."""
    hidden = []
    for applied in (None, policy):
        with _context(model, applied):
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        hidden.append(states[0, :-1])
    head = model.get_output_embeddings()
    comparison = _Comparison(ids.device)
    for rows in _chunks(hidden[0]):
        comparison.add(head(hidden[0][rows]), head(hidden[1][rows]), ids[0, 1:][rows])
    return comparison.result()


@torch.no_grad()
def decode_logits(model: Any, cache: Any, ids: Tensor, policy: Policy | None) -> Tensor:
    """Logits ``[n, vocab]`` of ``ids``, fed singly behind ``cache``, which stays as it was."""
    before = cache.get_seq_length()
    rows = []
    with _context(model, policy):
        for token in ids[0].split(1):
            output = model(input_ids=token[None], past_key_values=cache, use_cache=True)
            rows.append(output.logits[0, -1])
    cache.crop(before - cache.get_seq_length())
    return torch.stack(rows)


@torch.no_grad()
def compare_decode(
    model: Any, ids: Tensor, policies: Sequence[Policy], decode_tokens: int = 512
) -> list[Fidelity]:
    """Dense prefill of all but the last ``decode_tokens`` tokens, then one query at a time.

    Each of the last tokens is fed alone through the policy, in every layer, over a cache that its
    predecessors filled under the same policy, and compared with dense decoding.
    """
    context = ids.shape[1] - decode_tokens - 1
    if context < 1:
        raise ValueError(
            f"ids has {ids.shape[1]} tokens; decode_tokens={decode_tokens} needs at least "
            f"{decode_tokens + 2}: pass a longer text or decode fewer tokens."
        )
    cache = prefill(model, ids[:, :context])
    inputs, targets = ids[:, context:-1], ids[0, context + 1 :]
    dense = decode_logits(model, cache, inputs, None)
    results = []
    for policy in policies:
        comparison = _Comparison(ids.device)
        comparison.add(dense, decode_logits(model, cache, inputs, policy), targets)
        results.append(comparison.result())
    return results


@dataclass(frozen=True)
class Needle:
    """A retrieval line hidden in a text, and its question."""

    words: str
    code: str

    @property
    def statement(self) -> str:
        return f"The secret code for {self.words} is {self.code}.\n"

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
    none in the last twelfth of that distance.
    """
    begin = max(tokens - max_distance, 0)
    step = (tokens - begin) * 11 / 12 / len(needles)
    ids: list[int] = []
    pending = list(needles)
    due = begin + step / 2
    for line in text.splitlines(keepends=True):
        if pending and len(ids) >= due:
            ids += tokenizer(pending.pop(0).statement, add_special_tokens=False).input_ids
            due += step
        ids += tokenizer(line, add_special_tokens=False).input_ids
        if len(ids) >= tokens:
            break
    if len(ids) < tokens or pending:
        raise ValueError(f"the text has {len(ids)} tokens; {tokens} are needed: pass a longer text")
    return ids[:tokens]


@torch.no_grad()
def ask_needles(
    model: Any,
    tokenizer: Any,
    document: Sequence[int],
    needles: Sequence[Needle],
    policy: Policy | None,
    prompt_tokens: int,
) -> float:
    """Share of questions whose first answer token comes out right, one whole prefill each.

    Each prompt is the document, shortened to leave room, and one question; it ends where the answer
    would begin and has ``prompt_tokens`` tokens, so the question lies in the last tile. The whole
    prompt goes through the policy.
    """
    device = next(model.parameters()).device
    hits = []
    for needle in needles:
        question = tokenizer(needle.question, add_special_tokens=False).input_ids
        answered = tokenizer(f"{needle.question} {needle.code}", add_special_tokens=False).input_ids
        if answered[: len(question)] != question:
            raise ValueError(
                "the tokenizer merges the question with its answer: reword the question"
            )
        prompt = [*document[: prompt_tokens - len(question)], *question]
        if len(prompt) != prompt_tokens:
            raise ValueError(f"the document has {len(document)} tokens, {prompt_tokens} are needed")
        ids = torch.tensor([prompt], device=device)
        with _context(model, policy):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        hits.append(logits.argmax() == answered[len(question)])
    return torch.stack(hits).float().mean().item()


@torch.no_grad()
def greedy_tokens(
    model: Any,
    ids: Tensor,
    new_tokens: int,
    policy: Policy | None,
    prefill_chunk: int | None = None,
) -> list[int]:
    """The greedy continuation: prefill and every decoding step through the policy.

    ``prefill_chunk`` tokens are prefilled at a time, by default all of them at once.
    """
    with _context(model, policy):
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            prefill_chunk_size=prefill_chunk,
        )
    return [int(token) for token in output[0, ids.shape[1] :]]
