"""Captures one layer's Q, K, V of a causal LM on a text: the input of the demo.

`python tools/capture_layer.py --model DIR --text FILE [--layer N]`

A retrieval line is hidden at an eighth of the text and asked for at its end, so that the last
queries have something far away to find. Keys and values of all tokens are kept, queries of the last
ones; every row as int8 with one float16 scale. Without --layer a table shows, for each layer, where
its heads' softmax mass lies, and nothing is written.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from condensate_ext.evaluate import make_needles
from condensate_ext.model_files import load_causal_lm
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "examples/demo_layer/condensate_ext_demo/captured_layer.npz"
WINDOW, ANCHORS = 256, 64

Layer = tuple[Tensor, Tensor, Tensor]


def prompt(tokenizer: Any, text: str, tokens: int) -> tuple[list[int], tuple[int, int]]:
    """Token ids that end where the answer would begin, and where the statement lies in them."""
    (needle,) = make_needles(1)
    question = tokenizer(needle.question, add_special_tokens=False).input_ids
    statement = tokenizer("\n" + needle.statement, add_special_tokens=False).input_ids
    rest = tokenizer(text[: 16 * tokens], add_special_tokens=False).input_ids
    begin = tokens // 8
    body = (rest[:begin] + statement + rest[begin:])[: tokens - len(question)]
    return body + question, (begin, begin + len(statement))


def capture(model: Any, ids: list[int]) -> list[Layer]:
    """Post-RoPE query, key and value of every layer, float32."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layers: list[Layer] = []

    def keep(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> Any:
        layers.append((query.float(), key.float(), value.float()))
        return sdpa_attention_forward(module, query, key, value, *args, **kw)

    AttentionInterface.register("capture", keep)
    model.set_attn_implementation("capture")
    with torch.no_grad():
        model.base_model(input_ids=torch.tensor([ids]), use_cache=False)
    return layers


def describe(layer: Layer, queries: int, statement: tuple[int, int]) -> list[tuple[float, ...]]:
    """Per head: mass outside anchors and window, of the best 512 keys there, on the statement."""
    query, key, _ = layer
    length, group = key.shape[2], query.shape[1] // key.shape[1]
    positions = torch.arange(length - queries, length)[:, None]
    keys = torch.arange(length)[None]
    rows: list[tuple[float, ...]] = []
    for head in range(query.shape[1]):
        scores = query[0, head, -queries:] @ key[0, head // group].T * query.shape[-1] ** -0.5
        mass = scores.masked_fill(keys > positions, -torch.inf).softmax(-1)
        far = mass.masked_fill((keys < ANCHORS) | (keys > positions - WINDOW), 0)
        best = far.topk(512, -1).values.sum(-1)
        found = mass[-1, statement[0] : statement[1]].sum()
        rows.append((far.sum(-1).mean().item(), best.mean().item(), found.item()))
    return rows


def rows_to_int8(tensor: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    scale = (tensor.abs().amax(-1, keepdim=True) / 127).half()
    return (tensor / scale.float()).round().to(torch.int8).numpy(), scale.numpy()


def write(layer: Layer, queries: int, facts: dict[str, Any], path: Path) -> None:
    arrays: dict[str, Any] = {name: np.array(value) for name, value in facts.items()}
    query, key, value = layer
    parts = {"query": query[:, :, -queries:], "key": key, "value": value}
    for name, tensor in parts.items():
        arrays[name], arrays[f"{name}_scale"] = rows_to_int8(tensor)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="documents separated by NUL")
    parser.add_argument("--document", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--layer", type=int)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    tokenizer, model = load_causal_lm(options.model, torch.float32)
    text = options.text.read_text(encoding="utf-8").split("\0")[options.document]
    ids, statement = prompt(tokenizer, text, options.tokens)
    layers = capture(model, ids)
    for index, layer in enumerate(layers):
        if options.layer in (None, index):
            print(f"layer {index}: far mass / of its best 512 keys / last query on the statement")
            for row in describe(layer, options.queries, statement):
                print("  " + "  ".join(f"{value:.3f}" for value in row))
    if options.layer is not None:
        facts = {"model": options.model.name, "layer": options.layer, "statement": statement}
        write(layers[options.layer], options.queries, facts, options.output)


if __name__ == "__main__":
    main()
