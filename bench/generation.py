"""A model's time to its first token and tokens a second: dense, condensed and lossless.

`python -m bench.generation MODEL TEXT --tokens 4096 8192` runs a model folder on a text;
`--shape llama3-8b --layers 8` a random model of that shape, whose tokens mean nothing. Prints a
table and writes generation.json into the results of this card, or of `cpu`.

Ways to generate take turns, `--rounds` of them, and the median of each counts. They continue the
same prompt greedily. `condensed` runs prompt and steps through the policy, `decode` the steps
alone, `lossless` drafts by it and verifies densely. `same` counts tokens before the first that
dense generation does not have; two dense kernels differ by rounding, too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from condensate_ext._machine import cpu_name
from condensate_ext.evaluate.runs import attended
from condensate_ext.model_files import load_causal_lm
from condensate_ext.transformers import Lossless
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import report
from bench.report import Record

SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
    },
}  # fmt: skip
WAYS = ("dense", "condensed", "decode", "lossless")
Policy = dict[str, Any]


def random_model(shape: str, layers: int, device: str, dtype: torch.dtype) -> Any:
    """A Llama of one of ``SHAPES`` with random weights."""
    import transformers

    config = transformers.LlamaConfig(**SHAPES[shape], num_hidden_layers=layers)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def wait(ids: Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], ids: Tensor) -> tuple[float, Any]:
    """How long a call takes, and what it returns."""
    wait(ids)
    begin = time.perf_counter()
    result = call()
    wait(ids)
    return time.perf_counter() - begin, result


@torch.no_grad()
def generate(model: Any, ids: Tensor, way: str, new: int, policy: Policy) -> Record:
    """One generation: seconds of the prompt, seconds of the steps after it, tokens."""
    import transformers

    cache = transformers.DynamicCache(config=model.config)
    held = ids.shape[1] - 1
    with attended(model, policy if way == "condensed" else None):
        first, _ = seconds(
            lambda: model(input_ids=ids[:, :held], cache=cache, logits_to_keep=1), ids
        )
    options: dict[str, Any] = {
        "cache": cache, "attention_mask": torch.ones_like(ids), "do_sample": False,
        "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0,
    }  # fmt: skip
    lossless = Lossless(**policy) if way == "lossless" else None
    if lossless is not None:
        options["custom_generate"] = lossless
    with attended(model, policy if way in ("condensed", "decode") else None):
        steps, tokens = seconds(lambda: model.generate(ids, **options), ids)
    accepted = lossless.acceptance.mean_accepted if lossless is not None else None
    return {
        "way": way, "first_token_s": first, "steps_s": steps, "accepted": accepted,
        "tokens": tokens[0, ids.shape[1] :].tolist(),
    }  # fmt: skip


def common(first: list[int], second: list[int]) -> int:
    """Equal tokens at the beginning."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def measure(model: Any, ids: Tensor, new: int, rounds: int, policy: Policy) -> list[Record]:
    """A record a way: medians of rounds in which the ways take turns."""
    runs: dict[str, list[Record]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            runs[way].append(generate(model, ids, way, new, policy))
    dense = runs["dense"][0]["tokens"]
    return [
        {
            "way": way,
            "prompt_tokens": ids.shape[1],
            "new_tokens": new,
            "first_token_s": round(statistics.median(r["first_token_s"] for r in of_way), 4),
            "tokens_per_s": round(new / statistics.median(r["steps_s"] for r in of_way), 3),
            "accepted_per_round": of_way[0]["accepted"],
            "same_tokens": common(dense, of_way[0]["tokens"]),
            **policy,
        }
        for way, of_way in runs.items()
    ]


def table(records: list[Record]) -> Table:
    shown = Table("prompt", "way", "first token, s", "tokens/s", "accepted", "same tokens")
    for r in records:
        accepted = "" if r["accepted_per_round"] is None else f"{r['accepted_per_round']:.2f}"
        shown.add_row(
            f"{r['prompt_tokens']:,}", r["way"], f"{r['first_token_s']:.2f}",
            f"{r['tokens_per_s']:.2f}", accepted, f"{r['same_tokens']} of {r['new_tokens']}",
        )  # fmt: skip
    return shown


def load(chosen: argparse.Namespace, device: str, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """The model, and ids of the longest prompt."""
    length = max(chosen.tokens)
    if chosen.shape is not None:
        model = random_model(chosen.shape, chosen.layers, device, dtype)
        ids = torch.randint(1, model.config.vocab_size, (1, length), device=device)
        return model, ids
    tokenizer, model = load_causal_lm(Path(chosen.model), dtype)
    text = Path(chosen.text).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :length]
    if ids.shape[1] < length:
        raise SystemExit(f"{chosen.text} has {ids.shape[1]} tokens; --tokens asks for {length}")
    return model.to(device), ids.to(device)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.generation", description=__doc__)
    parser.add_argument("model", nargs="?", help="folder of a model")
    parser.add_argument("text", nargs="?", help="file that the prompts begin with")
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, default=8, help="of a random model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--topk", type=int, default=704)
    parser.add_argument("--shortlist", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    chosen = parser.parse_args(arguments)
    if (chosen.shape is None) == (chosen.model is None or chosen.text is None):
        parser.error("give MODEL and TEXT, or --shape")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, ids = load(chosen, device, getattr(torch, chosen.dtype))
    policy = {"topk": chosen.topk, "shortlist": chosen.shortlist}
    records = []
    for length in chosen.tokens:
        records += measure(model, ids[:, :length], chosen.new, chosen.rounds, policy)
        Console(stderr=True).print(table(records[-len(WAYS) :]))
    document = {
        **report.environment(),
        "model": chosen.shape or Path(chosen.model).name,
        "layers": model.config.num_hidden_layers,
        "dtype": chosen.dtype,
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
        "records": records,
    }
    path = report.results_folder() / "generation.json"
    report.save(document, path, "generation")
    Console().print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
