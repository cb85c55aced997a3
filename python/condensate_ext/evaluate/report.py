"""Records as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from condensate_ext._tables import make_table
from condensate_ext.evaluate.protocols import Record

if TYPE_CHECKING:
    from rich.table import Table


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _change(value: float) -> str:
    return f"{value:+.2f} %"


def _number(value: float) -> str:
    return f"{value:.4f}"


def _tokens(value: float) -> str:
    return f"{value:.1f}"


Column = tuple[str, str, Callable[[float], str]]  # field, heading, format

_LANGUAGE: tuple[Column, ...] = (
    ("kl", "KL, nats", _number),
    ("top1", "top-1", _percent),
    ("dppl_percent", "perplexity", _change),
    ("dppl_percent_low", "95 %: from", _change),
    ("dppl_percent_high", "to", _change),
    ("dppl_percent_median", "median text", _change),
    ("dppl_percent_worst", "worst text", _change),
)
_SURVIVAL: tuple[Column, ...] = (
    ("identical_tokens", "identical tokens, mean", _tokens),
    ("identical_tokens_median", "median", _tokens),
    ("survived", "prompts that survive", _percent),
)
_OMISSION: tuple[Column, ...] = (
    ("omitted_mean", "mean", _number),
    ("omitted_low", "95 % from", _number),
    ("omitted_high", "to", _number),
    ("omitted_p99", "p99", _number),
    ("omitted_max", "max", _number),
    ("estimate_mean", "estimated mean", _number),
    ("estimate_error", "estimate off by", _number),
    ("output_error", "output error", _number),
)
# protocol: (title, what a document was sampled at, columns)
TABLES: dict[str, tuple[str, str, tuple[Column, ...]]] = {
    "decode": ("decode: dense prefill, then one query at a time", "tokens", _LANGUAGE),
    "prefill": ("prefill through the policy, dense behind it", "tokens", _LANGUAGE),
    "needles": (
        "needles: the question in the last tile, the answer decoded",
        "questions",
        (("needle_first", "first token", _percent), ("needle_all", "all characters", _percent)),
    ),
    "survival": ("greedy continuations, until the first difference", "tokens", _SURVIVAL),
    "omitted": (
        "softmax mass left out, of every layer and head, and the output's relative error",
        "rows a head",
        _OMISSION,
    ),
    "steps": ("the same of decoding steps", "rows a head", _OMISSION),
}


_TASK: tuple[str, str, tuple[Column, ...]] = (
    "lm-eval's {protocol}",
    "scores",
    (("score", "mean score", _number), ("score_low", "95 %: from", _number),
     ("score_high", "to", _number)),
)  # fmt: skip


def hints(records: Sequence[Record]) -> list[str]:
    """What to think of where the model fails without condensate already."""
    dense = next((r for r in records if (r["protocol"], r["keys"]) == ("needles", None)), None)
    if dense is None or dense["needle_first"] >= 0.5:
        return []
    return [
        f"Dense attention itself answers {100 * dense['needle_first']:.0f} % of the needles: the "
        "question fails here, not the policy. Try --needle-form statement, or --chat."
    ]


def tables(records: Sequence[Record]) -> list[Table]:
    """One table a protocol, in the order of the records."""
    return [_table(name, records) for name in dict.fromkeys(r["protocol"] for r in records)]


def cells(protocol: str, records: Sequence[Record]) -> tuple[str, list[str], list[list[str]]]:
    """Title, headings and rows of a protocol's table, as text."""
    # "greedy, float32" and its like are continuations too.
    other = _TASK if protocol.startswith("task ") else (protocol, "tokens", _SURVIVAL)
    title, sampled, columns = TABLES.get(protocol, other)
    title = title.format(protocol=protocol)
    headings = [heading for _, heading, _ in columns]
    rows = []
    for r in records:
        if r["protocol"] == protocol:
            values = (r.get(field) for field, _, _ in columns)
            shown = ["-" if v is None else c[2](v) for v, c in zip(values, columns, strict=True)]
            sample = f"{r['tokens']} in {r['documents']}"
            rows.append([variant_name(r), keys_of(r), *shown, sample])
    return title, ["attention", "keys", *headings, f"{sampled} in texts"], rows


def _table(protocol: str, records: Sequence[Record]) -> Table:
    return make_table(*cells(protocol, records))


def keys_of(r: Record) -> str:
    """Keys per query: the budget, or what lists hold on average below it."""
    if r["keys"] is None:
        return "all"
    return str(r["keys"]) if r["keys_mean"] is None else f"{r['keys_mean']:.0f} of {r['keys']}"


def variant_name(r: Record) -> str:
    """The selector, and what of the policy is not plain."""
    extra = [", far field"] if r["far_field"] else []
    extra += [f", top-p {r['top_p']:g}"] if r["top_p"] is not None else []
    return "".join([r["selector"], *extra])
