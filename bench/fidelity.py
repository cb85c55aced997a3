"""Quality on a trained model: `python -m bench.fidelity --model DIR --text FILE`.

Writes bench/results/<card>/fidelity.json, one record a protocol, selector and budget:

decode    dense prefill, then the last tokens of each document one query at a time through the
          policy in every layer; KL to dense decoding in nats, top-1 agreement, perplexity change.
needles   prompts that end where an answer begins, so the question lies in the last prefill tile
          and the answer does not; the whole prompt goes through the policy; the share of first
          answer tokens that are right. Statements lie within --needle-distance tokens.
greedy    a budget that covers the context; how many tokens of the greedy continuation are
          identical to the dense model's before the first difference.

The text holds documents separated by a NUL byte.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from condensate_ext import evaluate
from condensate_ext.evaluate import Policy
from rich.console import Console
from rich.table import Table

from bench import report
from bench.report import Record

WINDOW, ANCHORS = 256, 64
GREEDY_TOKENS = 64
# torch's dense float32 attention keeps a score matrix for grouped heads; chunks keep it small.
FLOAT32_CHUNK = 4096


def policy(keys: int, selector: str) -> Policy:
    """`keys` per query in all: anchors, window and the selected ones."""
    return {
        "window": WINDOW,
        "anchors": ANCHORS,
        "topk": keys - WINDOW - ANCHORS,
        "selector": selector,
        "far_field": False,  # as README's table says
    }


def record(protocol: str, selector: str, keys: int | None, **values: Any) -> Record:
    """Every record has every key; what a protocol does not measure is null."""
    fields = ("kl", "top1", "dppl_percent", "needle_first", "identical_tokens")
    empty = dict.fromkeys(fields)
    return {"protocol": protocol, "selector": selector, "keys": keys, **empty, **values}


class Run:
    """A model, its tokenizer, and the documents of one run."""

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
        )
        self.model = model.to(options.device).eval()
        texts = options.text.read_text(encoding="utf-8").split("\0")
        # Tokenising all of a document would take longer than running the model on its beginning.
        self.texts = [text[: 16 * options.context] for text in texts[: options.documents]]
        if len(self.texts) < options.documents:
            raise SystemExit(
                f"{options.text} holds {len(texts)} documents, not {options.documents}"
            )

    def document(self, text: str, tokens: int) -> torch.Tensor:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids[:tokens]
        if len(ids) < tokens:
            raise SystemExit(f"a document has only {len(ids)} tokens, {tokens} are needed")
        return torch.tensor([ids], device=self.options.device)

    def decode(self) -> Iterator[Record]:
        """The first token of the last `decode_tokens` has `context - decode_tokens` before it."""
        cases = [
            (selector, keys) for selector in ("block", "exact") for keys in self.options.decode
        ]
        policies = [policy(keys, selector) for selector, keys in cases]
        parts = []
        for text in self.texts:
            ids = self.document(text, self.options.context + 1)
            parts.append(
                evaluate.compare_decode(self.model, ids, policies, self.options.decode_tokens)
            )
        for (selector, keys), results in zip(cases, zip(*parts, strict=True), strict=True):
            count = len(results)
            # Perplexity is compared over all tokens, so changes multiply.
            change = torch.tensor([1 + r.dppl_percent / 100 for r in results]).log().mean().exp()
            yield record(
                "decode", selector, keys,
                kl=sum(r.kl for r in results) / count,
                top1=sum(r.top1 for r in results) / count,
                dppl_percent=100 * (change.item() - 1),
                documents=count, tokens=sum(r.tokens for r in results),
            )  # fmt: skip

    def needles(self) -> Iterator[Record]:
        options = self.options
        hidden = []
        for seed, text in enumerate(self.texts):
            needles = evaluate.make_needles(options.needles, seed)
            distance = min(options.needle_distance, options.context)
            document = evaluate.hide_needles(
                self.tokenizer, text, needles, options.context, distance
            )
            hidden.append((document, needles))
        for keys in (None, *options.needle_keys):
            applied = None if keys is None else policy(keys, "block")
            shares = [
                evaluate.ask_needles(
                    self.model, self.tokenizer, document, needles, applied, options.context
                )
                for document, needles in hidden
            ]
            yield record(
                "needles", "dense" if keys is None else "block", keys,
                needle_first=sum(shares) / len(shares),
                documents=len(shares), tokens=len(shares) * options.needles,
            )  # fmt: skip

    def greedy(self) -> Iterator[Record]:
        """In the run's dtype, and in float32, where rounding cannot turn a near-tie."""
        ids = self.document(self.texts[0], self.options.context - GREEDY_TOKENS)
        covering = {"topk": covering_topk(ids.shape[1] + GREEDY_TOKENS), "selector": "block"}
        for dtype in dict.fromkeys((self.options.dtype, "float32")):
            self.model.to(getattr(torch, dtype))
            chunk = FLOAT32_CHUNK if dtype == "float32" else None
            dense, ours = (
                evaluate.greedy_tokens(self.model, ids, GREEDY_TOKENS, applied, chunk)
                for applied in (None, covering)
            )
            equal = [a == b for a, b in zip(dense, ours, strict=True)]
            yield record(
                f"greedy, {dtype}", "block", ids.shape[1] + GREEDY_TOKENS,
                identical_tokens=equal.index(False) if False in equal else len(equal),
                documents=1, tokens=GREEDY_TOKENS,
            )  # fmt: skip
        self.model.to(getattr(torch, self.options.dtype))


def covering_topk(context: int) -> int:
    """The smallest topk, a multiple of 64, that reaches every key of a context."""
    return (context + 63) // 64 * 64


def table(records: list[Record]) -> Table:
    columns = {
        "kl": "KL", "top1": "top-1", "dppl_percent": "PPL change %",
        "needle_first": "first answer token", "identical_tokens": "identical tokens",
    }  # fmt: skip
    shown = Table(title="against the dense model")
    for column in ("protocol", "selector", "keys", *columns.values(), "documents", "tokens"):
        shown.add_column(column)
    for r in records:
        values = ["-" if r[c] is None else f"{r[c]:.4g}" for c in columns]
        keys = "all" if r["keys"] is None else str(r["keys"])
        shown.add_row(
            r["protocol"], r["selector"], keys, *values, str(r["documents"]), str(r["tokens"])
        )
    return shown


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.fidelity", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal LM")
    parser.add_argument("--text", type=Path, required=True, help="documents separated by NUL")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--context", type=int, default=32768, help="tokens")
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--decode-tokens", type=int, default=512)
    parser.add_argument("--decode", type=int, nargs="+", default=[2048], help="keys per query")
    parser.add_argument("--needles", type=int, default=12, help="questions per document")
    parser.add_argument("--needle-keys", type=int, nargs="+", default=[2048, 1024])
    parser.add_argument("--needle-distance", type=int, default=24576, help="tokens")
    parser.add_argument("--only", nargs="+", choices=("decode", "needles", "greedy"))
    parser.add_argument("--output", type=Path, default=report.results_folder() / "fidelity.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    run = Run(options)
    records: list[Record] = []
    seconds = {}
    for name in options.only or ("decode", "needles", "greedy"):
        began = time.perf_counter()
        records += getattr(run, name)()
        seconds[name] = round(time.perf_counter() - began, 1)
    settings = {
        "model": options.model.name, "text": options.text.name, "context": options.context,
        "dtype": options.dtype, "window": WINDOW, "anchors": ANCHORS,
        "needle_distance": options.needle_distance,
    }  # fmt: skip
    document = {
        "environment": report.environment(), "settings": settings, "seconds": seconds,
        "records": records,
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    Console(width=140).print(table(records))
    print(f"{seconds} s, written to {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
