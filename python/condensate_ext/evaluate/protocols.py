"""Every protocol on a subject: plain records, one a policy, the same for every reporter.

A record names its protocol and policy and has every field of ``FIELDS``, null where its protocol
does not measure it. Shares are 0 to 1, KL is in nats, perplexity changes in percent.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from condensate_ext.evaluate import language, omission, survival
from condensate_ext.evaluate.budgets import mean_keys
from condensate_ext.evaluate.forms import Form
from condensate_ext.evaluate.language import Fidelity
from condensate_ext.evaluate.needles import QUESTION, ask_needles, hide_needles, make_needles
from condensate_ext.evaluate.omission import Audit
from condensate_ext.evaluate.policies import (
    CONTROL,
    Policy,
    Variant,
    effective,
    keys_per_query,
    selector_name,
)
from condensate_ext.evaluate.runs import Advance, share_of, silent
from condensate_ext.evaluate.subject import Subject

Record = dict[str, Any]

FIELDS = (
    "keys_mean", "kl", "top1", "dppl_percent", "dppl_percent_low", "dppl_percent_high",
    "dppl_percent_median", "dppl_percent_worst",
    "needle_first", "needle_all", "score", "score_low", "score_high",
    "identical_tokens", "identical_tokens_median", "survived",
    "omitted_mean", "omitted_low", "omitted_high", "omitted_p99", "omitted_max",
    "estimate_mean", "estimate_error", "output_error",
)  # fmt: skip

_PROMPT_MULTIPLE = 64  # a whole number of tiles, so that the last one is full
Compare = Callable[[Any, Tensor, Sequence[Variant], int, Advance], list[list[Fidelity]]]


def record(protocol: str, variant: Variant, **values: Any) -> Record:
    """``keys`` is the budget per query, null for all keys."""
    unknown = values.keys() - {*FIELDS, "documents", "tokens"}
    if unknown:
        raise ValueError(f"a record has no {sorted(unknown)}")
    policy = variant if isinstance(variant, dict) else None
    return {
        "protocol": protocol,
        "selector": selector_name(variant),
        "keys": None if policy is None else keys_per_query(policy),
        "far_field": None if policy is None else effective(policy, "far_field"),
        "top_p": None if policy is None else effective(policy, "top_p"),
        "shortlist": None if policy is None else policy.get("shortlist"),
        **dict.fromkeys(FIELDS),
        **values,
    }


def _language(
    name: str,
    compare: Compare,
    subject: Subject,
    policies: Sequence[Policy],
    decode_tokens: int,
    advance: Advance,
) -> list[Record]:
    variants: list[Variant] = [CONTROL, *policies]
    documents: list[list[Fidelity]] = [[] for _ in variants]
    part = share_of(advance, subject.batch_count)
    for ids in subject.batches(subject.context + 1):
        results = compare(subject.model, ids, variants, decode_tokens, part)
        for collected, result in zip(documents, results, strict=True):
            collected += result
    return [
        record(name, variant, **language.summary(results))
        for variant, results in zip(variants, documents, strict=True)
    ]


def decode(
    subject: Subject,
    policies: Sequence[Policy],
    decode_tokens: int = 512,
    advance: Advance = silent,
) -> list[Record]:
    """Dense prefill, then the last tokens of the context one query at a time.

    Where ``top_p`` shortens lists, ``keys_mean`` is how many keys a query attends on average.
    """
    records = _language(
        "decode", language.compare_decode, subject, policies, decode_tokens, advance
    )
    for of_policy, policy in zip(records[1:], policies, strict=True):
        if effective(policy, "top_p") is not None:
            ids = subject.ids(subject.windows[: subject.batch], subject.context)
            of_policy["keys_mean"] = mean_keys(subject.model, ids, policy)
    return records


def prefill(
    subject: Subject,
    policies: Sequence[Policy],
    decode_tokens: int = 512,
    advance: Advance = silent,
) -> list[Record]:
    """Prefill of all but the last tokens through the policy, those densely over its cache."""
    return _language("prefill", language.compare_cache, subject, policies, decode_tokens, advance)


def needles(
    subject: Subject,
    policies: Sequence[Policy],
    count: int = 12,
    distance: int | None = None,
    advance: Advance = silent,
    form: Form = QUESTION,
) -> list[Record]:
    """``count`` statements a document, within ``distance`` tokens of its end, and asked for."""
    prompt_tokens = subject.context // _PROMPT_MULTIPLE * _PROMPT_MULTIPLE
    reach = min(distance or subject.context, subject.context)
    hidden = []
    for seed, window in enumerate(subject.windows):
        asked = make_needles(count, seed)
        document = hide_needles(subject.tokenizer, window.text, asked, subject.context, reach)
        hidden.append((document, asked))
    variants: list[Variant] = [None, *policies]
    part = share_of(advance, len(variants) * len(hidden))
    records = []
    for variant in variants:
        answers = [
            answer
            for document, asked in hidden
            for answer in ask_needles(
                subject.model, subject.tokenizer, document, asked, variant, prompt_tokens,
                form=form, batch=subject.batch, advance=part,
            )
        ]  # fmt: skip
        scores = {
            "needle_first": statistics.fmean(answer.first for answer in answers),
            "needle_all": statistics.fmean(answer.whole for answer in answers),
            "documents": len(hidden),
            "tokens": len(answers),
        }
        records.append(record("needles", variant, **scores))
    return records


def survive(
    subject: Subject, policies: Sequence[Policy], new_tokens: int = 128, advance: Advance = silent
) -> list[Record]:
    """Greedy continuations of every document's beginning, until the context is full."""
    variants: list[Variant] = [CONTROL, *policies]
    identical: list[list[int]] = [[] for _ in variants]
    part = share_of(advance, subject.batch_count)
    for ids in subject.batches(subject.context - new_tokens):
        results = survival.compare_continuations(
            subject.model, ids, variants, new_tokens, advance=part
        )
        for collected, result in zip(identical, results, strict=True):
            collected += result
    return [
        record("survival", variant, **survival.summary(counts, new_tokens))
        for variant, counts in zip(variants, identical, strict=True)
    ]


def omitted(
    subject: Subject, policies: Sequence[Policy], advance: Advance = silent
) -> tuple[list[Record], list[Audit]]:
    """Softmax mass left out and output error, on sampled rows of every layer and head.

    Returns the records, and for each policy the audit that it sums up.
    """
    return _audited("omitted", subject, policies, omission.AUDITED_ROWS, advance, alone=False)


def steps(subject: Subject, policies: Sequence[Policy], advance: Advance = silent) -> list[Record]:
    """The same of decoding steps: each sampled row is a call of its own."""
    return _audited("steps", subject, policies, omission.AUDITED_STEPS, advance, alone=True)[0]


def _audited(
    name: str,
    subject: Subject,
    policies: Sequence[Policy],
    count: int,
    advance: Advance,
    *,
    alone: bool,
) -> tuple[list[Record], list[Audit]]:
    parts: list[list[Audit]] = [[] for _ in policies]
    part = share_of(advance, len(subject.windows))
    drawn = omission.audited_rows(subject.context, len(subject.windows), count)
    for window, rows in zip(subject.windows, drawn, strict=True):
        ids = subject.ids([window], subject.context)
        results = omission.audit(subject.model, ids, policies, rows, part, alone=alone)
        for collected, result in zip(parts, results, strict=True):
            collected.append(result)
    whole = [omission.joined(collected) for collected in parts]
    audited = sum(map(len, drawn))
    return [
        record(
            name, policy, **omission.summary(result),
            documents=len(subject.windows), tokens=audited,
        )
        for policy, result in zip(policies, whole, strict=True)
    ], whole  # fmt: skip
