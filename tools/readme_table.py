"""Writes the tables of README.md and docs/ from the committed results:
`python tools/readme_table.py`.

Every figure between the markers comes from bench/results, of the first of CARDS that has them;
`--check` changes nothing and fails when a page says something else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CARDS = ("nvidia-h200", "nvidia-h100")
HEADLINES = (8192, 16384, 32768, 65536, 131072)  # tokens
PROTOCOLS = {
    "decode": "decode, one query at a time",
    "needles": "needles within {distance:,} tokens, asked in the last tile",
    "prefill": "prefill through the policy, dense behind it",
    "omitted": "softmax mass left out",
    "steps": "softmax mass left out by decoding steps",
    "survival": "greedy continuation",
}
Record = dict[str, Any]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(value: float) -> str:
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def microseconds(value: float | None) -> str:
    return "-" if value is None else f"{1e3 * value:.{1 if value < 0.1 else 0}f}"


def caption(document: Record, what: str) -> str:
    e = document["environment"]
    made = f"{e['date']}, commit {e['commit'][:7]}"
    return f"{what}. {e['gpu']}, torch {e['torch']}, CUDA {e['cuda']}, {made}."


def where_dense_wins(records: list[Record]) -> str:
    slower = [
        f"{r['n']:,} tokens with {r['budget']:,} keys and {r['heads']} heads ({r['speedup']:.2f}x)"
        for r in records
        if r["speedup"] < 1
    ]
    if not slower:
        shortest = min(r["n"] for r in records)
        return f"Dense attention was slower in every case measured, from {shortest:,} tokens on."
    return f"**Torch's dense attention wins** at {', '.join(slower)}."


def lists_given(records: list[Record]) -> str:
    """The attention alone beside FlexAttention, in the longest case that has both."""
    r = max((r for r in records if "flex_same_lists" in r["peers"]), key=lambda r: r["total_ms"])
    return (
        f"With the lists given, {r['n']:,} tokens with {r['budget']:,} keys take "
        f"{milliseconds(r['attend_ms'])} ms; FlexAttention takes "
        f"{milliseconds(r['peers']['flex_same_lists'])} ms on the same lists."
    )


def prefill_table(document: Record) -> str:
    records = sorted(document["records"], key=lambda r: (r["n"], r["heads"], r["budget"]))
    rows = [
        [
            f"{r['n']:,}, H{r['heads']} KV{r['kv_heads']} d{r['head_dim']} {r['dtype']}",
            f"{r['budget']:,}" if r["selection"] == "blocks" else "all",
            milliseconds(r["total_ms"]),
            milliseconds(r["forward_ms"]),
            milliseconds(r["support_ms"]),
            milliseconds(r["select_ms"]) if r["selection"] == "blocks" else "-",
            f"{milliseconds(r['peer_ms'])} ({r['peer'].removeprefix('sdpa_')})",
            f"{r['speedup']:.1f}x",
            f"{r['memory_percent']:.0f} %",
        ]
        for r in records
    ]
    header = [
        "tokens, shape", "keys per query", "`attention()` ms", "with the omitted mass estimated",
        "without far field", "of it selection",
        "torch's best dense ms", "speed-up", "memory, of K and V",
    ]  # fmt: skip
    title = caption(document, "Causal prefill, batch 1, selection and far field included")
    notes = f"{where_dense_wins(records)} {lists_given(records)}"
    return f"{title}\n\n{markdown(header, rows)}\n\n{notes}"


def headlines_table(document: Record) -> str:
    """The reference shape at lengths that show where it starts to pay."""
    records = {r["n"]: r for r in document["records"] if headline(r)}
    rows = [
        [
            f"{n:,}",
            milliseconds(r["total_ms"]),
            f"{milliseconds(r['peer_ms'])} ({r['peer'].removeprefix('sdpa_')})",
            f"{r['speedup']:.1f}x",
        ]
        for n, r in sorted(records.items())
    ]
    header = ["tokens", "`attention()` ms", "torch's best dense ms", "speed-up"]
    what = (
        "Causal prefill of one sequence, 32 query and 8 KV heads, head_dim 128, bfloat16, 2,048 "
        "keys per query"
    )
    return f"{caption(document, what)}\n\n{markdown(header, rows)}"


def headline(r: Record) -> bool:
    shape = (r["heads"], r["head_dim"], r["budget"])
    return shape == (32, 128, 2048) and r["n"] in HEADLINES


def decode_table(document: Record) -> str:
    rows = [
        [
            f"{r['batch']} x {r['n']:,}, {r['query_len']} new, H{r['heads']} KV{r['kv_heads']} "
            f"d{r['head_dim']} {r['dtype']}, pages of {r['page_size']}",
            r["kind"],
            "all" if r["selection"] == "dense" else f"{r['budget']:,}",
            *(microseconds(r[f"{part}_ms"]) for part in ("total", "update", "select")),
            f"{microseconds(r['peer_ms'])} ({r['peer']})",
            f"{r['speedup']:.1f}x",
            f"{r['percent_of_copy_bandwidth']:.0f} %",
        ]
        for r in sorted(document["records"], key=lambda r: (r["kind"], r["n"], r["batch"]))
    ]
    header = [
        "sequences x keys", "kind", "keys per query", "step us", "of it update", "of it selection",
        "best dense us", "speed-up", "of copy bandwidth",
    ]  # fmt: skip
    return f"{caption(document, 'Decoding over a cache')}\n\n{markdown(header, rows)}"


def result(record: Record) -> list[str]:
    """What was measured, in words. Fields that older results lack are left out."""
    r = {name: value for name, value in record.items() if value is not None}
    if "needle_first" in r:
        whole = f", all characters: {100 * r['needle_all']:.0f} %" if "needle_all" in r else ""
        return [f"first answer token right: {100 * r['needle_first']:.0f} %{whole}"]
    if r["protocol"] == "survival":
        length = r["tokens"] // r["documents"]
        return [
            f"{100 * r['survived']:.0f} % identical to dense over {length} tokens, median "
            f"{r['identical_tokens_median']:.0f} tokens until the first difference"
        ]
    if "identical_tokens" in r:
        return [f"{r['identical_tokens']:.0f} of {r['tokens']} tokens identical to dense"]
    if "omitted_mean" in r:
        interval = (
            f" (95 %: {r['omitted_low']:.3f} to {r['omitted_high']:.3f})"
            if "omitted_low" in r
            else ""
        )
        return [
            f"mean {r['omitted_mean']:.3f}{interval}, p99 {r['omitted_p99']:.2f}, estimate off by "
            f"{r['estimate_error']:.3f}; output error {r['output_error']:.2f}"
        ]
    documents = (
        f" (median text {r['dppl_percent_median']:+.1f}, worst {r['dppl_percent_worst']:+.1f})"
        if "dppl_percent_worst" in r
        else ""
    )
    return [
        f"KL {r['kl']:.4f}, top-1 {100 * r['top1']:.1f} %, "
        f"perplexity {r['dppl_percent']:+.1f} %{documents}"
    ]


def selector(record: Record) -> str:
    """With what becomes of the rest, where that is not the operator's default."""
    dropped = record.get("far_field") is False and record["protocol"] not in ("omitted", "steps")
    top_p = f", top_p {record['top_p']:g}" if record.get("top_p") else ""
    return str(record["selector"]) + top_p + (", no far field" if dropped else "")


def fidelity_rows(document: Record) -> list[list[str]]:
    rows = []
    for r in document["records"]:
        protocol = PROTOCOLS.get(r["protocol"], r["protocol"] + ", budget >= context")
        protocol = protocol.format(distance=document["settings"]["needle_distance"])
        keys = "all" if r["keys"] is None else f"{r.get('keys_mean') or r['keys']:,.0f}"
        sample = f"{r['tokens']} in {r['documents']}"
        rows.append([protocol, selector(r), keys, *result(r), sample])
    return rows


def fidelity_table(document: Record, *more: Record) -> str:
    rows = [row for d in (document, *more) for row in fidelity_rows(d)]
    s = document["settings"]
    what = (
        f"`tiny-code-lm` (30 M parameters) on held-out source code, {s['context']:,} tokens of "
        f"context, {s['dtype']}, every layer through the op"
    )
    header = [
        "protocol",
        "selector",
        "keys per query",
        "against dense",
        "tokens or questions, texts",
    ]
    return f"{caption(document, what)}\n\n{markdown(header, rows)}"


# Pages, their tables, and the results that each is made of: of needles nearer than the model's
# reach, too.
Table = tuple[Callable[..., str], tuple[str, ...]]
PAGES: dict[str, dict[str, Table]] = {
    "README.md": {"headlines": (headlines_table, ("prefill",))},
    "docs/performance.md": {
        "prefill": (prefill_table, ("prefill",)),
        "decode": (decode_table, ("decode",)),
    },
    "docs/quality.md": {"fidelity": (fidelity_table, ("fidelity", "needles"))},
}


def fill(page: str, text: str) -> str:
    """The page with every table made anew."""
    for name, (table, sources) in PAGES[page].items():
        begin, end = f"<!-- {name}: made by tools/readme_table.py -->", f"<!-- end of {name} -->"
        head, _, rest = text.partition(begin)
        _, found, tail = rest.partition(end)
        if not found:
            raise SystemExit(f"{page} lacks the markers of table '{name}'")
        cards = [
            RESULTS / card for card in CARDS if (RESULTS / card / f"{sources[0]}.json").exists()
        ]
        if cards:
            documents = [
                json.loads((cards[0] / f"{source}.json").read_text(encoding="utf-8"))
                for source in sources
            ]
            text = f"{head}{begin}\n{table(*documents)}\n{end}{tail}"
        else:
            print(
                f"no {sources[0]}.json in {RESULTS}: table '{name}' of {page} stays as it is",
                file=sys.stderr,
            )
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when a page differs")
    options = parser.parse_args()
    stale = 0
    for page in PAGES:
        before = (ROOT / page).read_text(encoding="utf-8")
        after = fill(page, before)
        stale += before != after
        if not options.check:
            (ROOT / page).write_text(after, encoding="utf-8")
        elif before != after:
            print(f"{page} differs from the results: run tools/readme_table.py", file=sys.stderr)
    return int(options.check and stale > 0)


if __name__ == "__main__":
    raise SystemExit(main())
