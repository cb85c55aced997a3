"""Calls that must be refused, over all ops: every argument with everything it must not be."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tools.scorecard.calls import OPS, Arguments, Op, Sizes, tensors_of
from tools.scorecard.line import Line, Piece, Tally

HUGE, FRACTION = 2**31, 2.5
COUNTS: tuple[Any, ...] = (-1, -(2**62), HUGE, 2**62, 2**70, FRACTION, None, True, "1", [1])
FLAGS: tuple[Any, ...] = (None, 0, 1, "yes", 0.5)
SCALES: tuple[Any, ...] = (math.nan, math.inf, -math.inf, 1e39, -1e300, "1", [1.0])
SHARES: tuple[Any, ...] = (0.0, -0.1, 1.01, math.nan, math.inf, "0.5", [0.5])
NAMES: tuple[Any, ...] = ("best", "", "BLOCK", 0, 3, None, b"block")

SCALARS: dict[str, tuple[Any, ...]] = {
    "window": COUNTS,
    "anchors": COUNTS,
    "topk": COUNTS,
    "kv_len": COUNTS,
    "causal": FLAGS,
    "scale": SCALES,
    "top_p": SHARES,
    "selector": NAMES,
    "far_field": ("yes", 0, 2.0),
}


def _ragged(tensor: Tensor) -> Tensor:
    rows = [torch.zeros(3, 8), torch.zeros(5, 8)]
    return torch.nested.nested_tensor([row.to(tensor.device, tensor.dtype) for row in rows])


def _wrong_tensors(tensor: Tensor) -> Iterator[tuple[str, Any]]:
    """What no op may take in the tensor's place."""
    yield "None", None
    yield "a list", [[1.0]]
    yield "a number", 3
    yield "an array", tensor.cpu().float().numpy()
    yield "one dimension less", tensor[0]
    yield "one dimension more", tensor[None]
    yield "no dimension", tensor.flatten()[0]
    yield "another dtype", tensor.to(torch.float64)
    yield "bool", tensor.bool()
    yield "complex", tensor.to(torch.complex64)
    yield "int16", tensor.to(torch.int16)
    yield "float8", tensor.float().to(torch.float8_e4m3fn)
    yield "meta", tensor.to("meta")
    yield "sparse", tensor.to_sparse()
    yield "nested", _ragged(tensor)
    yield "quantized", torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)
    if tensor.device.type == "cuda":
        yield "on the CPU", tensor.cpu()
    if tensor.dim() > 1:
        yield "another batch", torch.cat([tensor, tensor])
        yield "another last size", torch.cat([tensor, tensor[..., :1]], -1)
        yield "a stride in the last dimension", tensor.repeat_interleave(2, -1)[..., ::2]


def _optional(op: Op, name: str) -> bool:
    return (op.name, name) in {("select_blocks", "key"), ("omitted_mass", "rows")}


def _may_pass(op: Op, name: str, fault: str, sizes: Sizes) -> bool:
    """Is the call sound after all?"""
    optional = fault == "None" and _optional(op, name)
    # The keys of a summary stand alone: any batch and any multiple of 8 will do.
    alone = op.name == "block_summaries" and fault in ("another batch", "meta")
    # A list of another width is a list.
    wide = name == "block_indices" and fault == "another last size"
    return optional or alone or wide


def faults(op: Op, sound: Arguments, sizes: Sizes) -> Iterator[tuple[str, str, Any]]:
    """(argument, what is wrong, value) of every bad call of an op."""
    for name, tensor in tensors_of(sound).items():
        for words, value in _wrong_tensors(tensor):
            if not _may_pass(op, name, words, sizes):
                yield name, words, value
    schema = getattr(torch.ops.condensate, op.name).default._schema
    for argument in schema.arguments:
        for value in SCALARS.get(argument.name, ()):
            if not (argument.name == "kv_len" and value is None):  # which the keys tell
                yield argument.name, f"{value!r}", value
    names = [argument.name for argument in schema.arguments]
    if "topk" in names and op.name != "select_tokens":
        yield from (("topk", f"{keys}", keys) for keys in (1, 63, 65, 1000))
    if "topk_per_head" in names:
        budgets = torch.zeros(sizes.kv_heads, dtype=torch.int32)
        for words, value in _wrong_tensors(budgets):
            if words != "None":
                yield "topk_per_head", words, value
    if op.selectors and "scale" in names:
        yield from (("scale", f"{scale}", scale) for scale in (0.0, -1.0))


def _verdict(op: Op, arguments: Arguments, name: str) -> str:
    """clear, unclear or silent, with the words. Of tensors that do not fit, either may be named."""
    value = arguments[name]
    names = [name]
    if isinstance(value, Tensor):
        names = [*tensors_of(arguments), "head_dim"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            op(arguments)
    except ValueError as error:
        words = str(error)
        named = any(name in words for name in names)
        clear = named and "expected" in words and ";" in words
        return "clear" if clear else f"unclear: {words}"
    except Exception as error:
        return f"unclear: {type(error).__name__}: {error}"
    return "silent"


def run(piece: Piece) -> Tally:
    tally = Tally()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in OPS:
            sizes = Sizes(query_len=9, kv_len=200, group=piece.rng().choice([1, 2, 4]))
            sound = op.make(sizes, piece.device, piece.generator())
            for name, words, value in faults(op, sound, sizes):
                verdict = _verdict(op, {**sound, name: value}, name)
                tally.add(verdict.split(":")[0], 1)
                tally.check(verdict == "clear", f"{op.name}({name}: {words}) {verdict}")
    return tally


LINE = Line(
    "bad calls",
    "refusals",
    "500 clear, 0 unclear, silent or crashed",
    {"reduced": 1, "full": 2},
    run,
    why="Every argument of every op in turn with what it must not be: a ValueError has to name the "
    "argument, what was expected and the fix.",
)
