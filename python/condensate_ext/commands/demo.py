"""``condensate demo``: what is attended, what is left out, and what that saves.

Without arguments it takes a captured layer of a trained model that ships with the package: no
network, no GPU. With --model it runs a Hugging Face causal LM through the op and compares it with
itself under dense attention.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from condensate_ext import captured
from condensate_ext._tables import make_table
from condensate_ext.captured import CapturedLayer
from condensate_ext.commands import console
from condensate_ext.commands.options import DEVICE, DTYPE, check_dtype
from condensate_ext.evaluate.policies import ANCHORS, WINDOW, policy
from condensate_ext.ops import (
    attention,
    attention_forward,
    block_sparse_attention,
    block_summaries,
    select_blocks,
)
from condensate_ext.states import omitted_mass

if TYPE_CHECKING:
    from rich.table import Table

# (selector, keys per query in all)
LAYER_CASES = (
    ("block", 512),
    ("block", 1024),
    ("block", 2048),
    ("quest", 1024),
    ("mean", 1024),
    ("exact", 1024),
)
DRAWN_KEYS = 1024
GPU_LENGTHS = (32768, 131072)
GPU_KEYS = 2048
GPU_HEADS, GPU_KV_HEADS, GPU_HEAD_DIM = 32, 8, 128


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median wall time of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's attention for queries that are the last of the keys' positions."""
    if query.shape[2] == key.shape[2]:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    mask = mask.tril(key.shape[2] - query.shape[2])
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def relative_error(out: Tensor, dense: Tensor) -> float:
    error: Tensor = (out.float() - dense.float()).norm() / dense.float().norm()
    return error.item()


def keys_per_query(layer: CapturedLayer, selector: str, keys: int) -> float:
    """Keys that a query attends, on average, without far field: with queries of 0 every key adds 1
    to exp(lse)."""
    if selector == "exact":
        return float(keys)  # every query of the layer has more keys than the budget
    lists = select_blocks(
        layer.query,
        block_summaries(layer.key, selector=selector),  # type: ignore[arg-type]
        kv_len=layer.key.shape[2],
        far_field=False,
        **policy(selector, keys),
    )
    zero = torch.zeros_like(layer.query)
    _, lse = block_sparse_attention(
        zero, layer.key, layer.value, *lists, window=WINDOW, anchors=ANCHORS, far_field=False
    )
    return lse.exp().mean().item()


def layer_table(layer: CapturedLayer) -> Table:
    """Dense attention and every case on the captured layer."""
    device, queries, keys = layer.query.device, layer.query.shape[2], layer.key.shape[2]
    title = (
        f"{layer.model}, layer {layer.layer}: the last {queries} of {keys} tokens, "
        f"{str(layer.query.dtype).removeprefix('torch.')} on {device.type}"
    )
    headings = (
        "attention",
        "keys per query",
        "ms",
        "speed-up",
        "omitted, estimated",
        "omitted, audited",
        "error",
        "with far field",
    )
    dense = dense_attention(layer.query, layer.key, layer.value)
    dense_ms = milliseconds(lambda: dense_attention(layer.query, layer.key, layer.value), device)
    visible = keys - (queries - 1) / 2
    rows = [["dense (torch)", f"{visible:.0f}", f"{dense_ms:.1f}", "1.0x", "0", "0", "0", "0"]]
    for selector, budget in LAYER_CASES:
        arguments = (layer.query, layer.key, layer.value)
        options = policy(selector, budget)
        out, lse, estimate = attention_forward(*arguments, **options, far_field=False)
        audited = omitted_mass(layer.query, layer.key, lse)
        condensed = None if selector == "exact" else attention(*arguments, **options)
        ms = milliseconds(lambda o=options, a=arguments: attention(*a, **o), device)  # type: ignore[misc]
        rows.append(
            [
                selector,
                f"{keys_per_query(layer, selector, budget):.0f}",
                f"{ms:.1f}",
                f"{dense_ms / ms:.1f}x",
                f"{estimate.mean().item():.3f}",
                f"{audited.mean().item():.3f}",
                f"{relative_error(out, dense):.3f}",
                "-" if condensed is None else f"{relative_error(condensed, dense):.3f}",
            ]
        )
    return make_table(title, headings, rows)


def best_dense_ms(query: Tensor, key: Tensor, value: Tensor) -> tuple[float, str]:
    """torch's fastest dense kernel for this call."""
    times = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            try:
                times[backend.name] = milliseconds(
                    lambda: dense_attention(query, key, value), query.device
                )
            except RuntimeError:  # this torch or this GPU has no such kernel; the other one counts
                continue
    if not times:
        raise RuntimeError("torch has neither a cuDNN nor a flash attention kernel for this GPU")
    name = min(times, key=lambda candidate: times[candidate])
    return times[name], name.removesuffix("_ATTENTION").lower()


def long_table(device: torch.device) -> Table:
    """Time at lengths that the captured layer does not have, on random normal numbers."""
    title = (
        f"prefill of random normal numbers: {GPU_HEADS} query and {GPU_KV_HEADS} KV heads, "
        f"head_dim {GPU_HEAD_DIM}, bfloat16, {GPU_KEYS} keys per query, selection included"
    )
    rows = []
    for length in GPU_LENGTHS:
        query, key, value = (
            torch.randn(1, heads, length, GPU_HEAD_DIM, device=device, dtype=torch.bfloat16)
            for heads in (GPU_HEADS, GPU_KV_HEADS, GPU_KV_HEADS)
        )
        options = policy("block", GPU_KEYS)
        call = lambda q=query, k=key, v=value: attention(q, k, v, **options)  # noqa: E731, B023
        ours = milliseconds(call, device)
        dense, name = best_dense_ms(query, key, value)
        rows.append([str(length), f"{ours:.2f}", f"{dense:.2f} ({name})", f"{dense / ours:.1f}x"])
    return make_table(title, ("tokens", "condensate ms", "best dense ms", "speed-up"), rows)


def draw_support(layer: CapturedLayer, path: Path) -> str:
    """Draws the picture, or says why there is none."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "No picture: drawing it needs matplotlib; `pip install matplotlib` adds it."
    from condensate_ext import support_plot

    options = policy("block", DRAWN_KEYS)
    support_plot.draw(
        layer, path, window=options["window"], anchors=options["anchors"], topk=options["topk"]
    )
    return f"The support of one head with {DRAWN_KEYS} keys per query: {path}"


def run_layer(shipped: CapturedLayer, device_name: str, png: Path) -> int:
    """The demo's layer: a table and a picture."""
    shown = console.console()
    device = torch.device(device_name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.no_grad():
        query, key, value = (
            t.to(device, dtype) for t in (shipped.query, shipped.key, shipped.value)
        )
        shown.print(layer_table(replace(shipped, query=query, key=key, value=value)))
        shown.print(
            "ms: the default, with far field where there is one.\n"
            "omitted: softmax mass outside the attended keys, as the selection estimates it and as "
            "scoring every key measures it.\n"
            "error: norm of the difference to dense attention's output, relative, without the far "
            "field and with it.\n"
            "dense: scaled_dot_product_attention with a mask, as the queries are the last of the "
            "text."
        )
        if device.type == "cuda":
            shown.print(long_table(device))
        console.say(shown, draw_support(shipped, png))
    return 0


def command(
    device: DEVICE = None,
    png: Annotated[Path, typer.Option(help="Where the picture is drawn.")] = Path(
        "condensate_support.png"
    ),
    model: Annotated[
        Path | None, typer.Option(help="Folder of a Hugging Face causal LM, instead of the layer.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Its text. Default: sources of Python's library.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens. Default: 4096, on a GPU 32768.")
    ] = None,
    keys: Annotated[list[int], typer.Option(help="Keys per query.")] = [1024, 2048],  # noqa: B006
    selector: Annotated[str, typer.Option(help="How keys are selected.")] = "block",
    dtype: DTYPE = None,
    decode: Annotated[
        int | None, typer.Option(help="Tokens compared one query at a time.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated greedily.")] = 64,
    needles: Annotated[int, typer.Option(help="Retrieval questions to ask.")] = 0,
) -> None:
    """Shows what is attended.

    On a layer of a trained model, a package of its own, what is attended, what is
    left out and what that saves; with --model compares a language model with itself.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if model is None:
        try:
            shipped = captured.load()
        except ImportError as error:
            print(f"Nothing to show: {error}")
            raise typer.Exit(console.FAILED) from None
        raise typer.Exit(run_layer(shipped, device, png))
    from condensate_ext.commands import demo_model

    try:
        console.need("demo --model", "transformers")
        if dtype is not None:
            check_dtype(dtype)
        options = demo_model.Options(
            model, text, device, dtype, context, tuple(keys), selector, decode, new_tokens, needles
        )
        status = demo_model.run(options)
    except ImportError as error:
        print(error)
        status = console.FAILED
    except (ValueError, NotImplementedError) as error:
        status = console.refuse("demo", error)
    raise typer.Exit(status)
