"""What the fakes check of arguments, in the words and the order of the operators.

Mirrors csrc/torch/tensor_args.cc, policy.h and csrc/host/validate.cc; tests hold the messages
together. Sizes may be symbolic: what cannot be told then is taken to be right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from condensate_ext._selectors import BLOCK_NAMES, SELECTORS, listed

BLOCK_KEYS = 64
MAX_GROUP = 64
MAX_HEAD_DIM = 256
LENGTH_LIMIT = 2**31
_ELEMENT_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_EXACT = SELECTORS["exact"]


def holds(condition: Any) -> bool:
    """A condition on sizes; true where symbolic sizes leave it open."""
    if isinstance(condition, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import guard_or_true

        return bool(guard_or_true(condition))
    return bool(condition)


def fail(op: str, message: str) -> NoReturn:
    raise ValueError(f"{op}: {message}")


class Argument(NamedTuple):
    """A tensor argument with the names that messages use."""

    op: str
    name: str
    tensor: Tensor

    @property
    def shape(self) -> str:
        return _list(self.tensor.shape)

    @property
    def dtype(self) -> str:
        return _name(self.tensor.dtype)

    def fail(self, message: str) -> NoReturn:
        fail(self.op, f"{self.name} {message}")


def _list(sizes: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_contiguous(tensor: Tensor) -> bool:
    if all(isinstance(size, int) for size in (*tensor.shape, *tensor.stride())):
        return tensor.is_contiguous()
    return True


def equal_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(holds(x == y) for x, y in zip(a, b, strict=True))


def view4(a: Argument) -> None:
    t = a.tensor
    if t.dim() != 4:
        a.fail(
            f"has shape {a.shape}, expected 4 dimensions [batch, heads, seq, head_dim]; reshape "
            "it, or use unsqueeze(0) where there is no batch."
        )
    stride = t.stride(3)
    if not holds(stride == 1) and holds(t.shape[3] > 1) and holds(t.numel() > 0):
        a.fail(
            f"has stride {stride} in its last dimension, expected 1 (head_dim contiguous); call "
            f"{a.name}.contiguous() first."
        )


def element_type(a: Argument) -> None:
    if a.tensor.dtype not in _ELEMENT_TYPES:
        a.fail(
            f"has dtype {a.dtype}, expected float16, bfloat16 or float32; convert it with "
            f"{a.name}.to()."
        )


def same_device(a: Argument, reference: Argument) -> None:
    if a.tensor.device != reference.tensor.device:
        a.fail(
            f"is on {a.tensor.device} and {reference.name} on {reference.tensor.device}, expected "
            "one device; move one with .to()."
        )


def same_type_and_device(a: Argument, reference: Argument) -> None:
    if a.tensor.dtype != reference.tensor.dtype:
        a.fail(
            f"has dtype {a.dtype} and {reference.name} has {reference.dtype}, expected one dtype; "
            "nothing is cast silently, convert one with .to()."
        )
    same_device(a, reference)


def contiguous(a: Argument, dtype: torch.dtype, reference: Argument, sizes: Sequence[Any]) -> None:
    if a.tensor.dtype != dtype:
        a.fail(f"has dtype {a.dtype}, expected {_name(dtype)}; convert it with .to().")
    same_device(a, reference)
    if not equal_sizes(a.tensor.shape, sizes):
        a.fail(
            f"has shape {a.shape}, expected {_list(sizes)} to fit the other arguments; check which "
            "call it comes from."
        )
    if not is_contiguous(a.tensor):
        a.fail(
            f"is not contiguous, expected a contiguous tensor; call {a.name}.contiguous() first."
        )


def heads(op: str, query_heads: Any, kv_name: str, kv_heads: Any) -> None:
    if (
        holds(kv_heads > 0)
        and holds(query_heads > 0)
        and holds(query_heads % kv_heads == 0)
        and holds(query_heads // kv_heads <= MAX_GROUP)
    ):
        return
    fail(
        op,
        f"query has {query_heads} heads and {kv_name} has {kv_heads}, expected a multiple of the "
        f"latter, 1 to {MAX_GROUP} times as many, fewer than 2^31; check that the tensors are "
        "[batch, heads, seq, head_dim].",
    )


def query_and_key(query: Argument, key: Argument) -> None:
    element_type(query)
    same_type_and_device(key, query)
    q, k = query.tensor.shape, key.tensor.shape
    if not equal_sizes((q[0], q[3]), (k[0], k[3])):
        key.fail(
            f"has shape {key.shape} and query {query.shape}, expected the same batch and head_dim; "
            "check that both are [batch, heads, seq, head_dim]."
        )
    heads(query.op, q[1], key.name, k[1])


def value(a: Argument, key: Argument) -> None:
    same_type_and_device(a, key)
    if not equal_sizes(a.tensor.shape, key.tensor.shape):
        a.fail(
            f"has shape {a.shape} and key {key.shape}, expected equal shapes; pad the smaller "
            "head_dim with zeros if only that differs."
        )


def selector(op: str, number: int) -> None:
    if number not in SELECTORS.values():
        fail(
            op,
            f"selector is {number}, expected "
            + listed([f"{own} ({name})" for name, own in SELECTORS.items()])
            + "; 0 is the default.",
        )


def block_selector(op: str, number: int) -> None:
    if number == _EXACT:
        fail(
            op,
            f'selector is "exact", expected {BLOCK_NAMES}; "exact" selects single keys: pass '
            'selector="exact" to attention.',
        )


def far_field(op: str, wanted: bool | None, number: int) -> None:
    if wanted and number == _EXACT:
        fail(
            op,
            'far_field is True with selector="exact", expected None or False there, as the far '
            'field condenses blocks and "exact" selects single keys; pass far_field=None, or '
            f"selector={BLOCK_NAMES}.",
        )


def topk(op: str, keys: Any, number: int) -> None:
    if not (holds(keys >= 0) and holds(keys < LENGTH_LIMIT)):
        fail(op, f"topk is {keys}, expected 0 <= topk < 2^31; pass 0 to select nothing.")
    if number == _EXACT or holds(keys % BLOCK_KEYS == 0):
        return
    lower = keys // BLOCK_KEYS * BLOCK_KEYS
    fail(
        op,
        f"topk is {keys}, expected a multiple of {BLOCK_KEYS} for the block selectors; pass "
        f'{lower} or {lower + BLOCK_KEYS}, or selector="exact", which takes any number of keys.',
    )


def budget(op: str, keys: Any, per_head: Tensor | None, top_p: float | None, number: int) -> None:
    topk(op, keys, number)
    if top_p is not None and not 0 < top_p <= 1:
        fail(
            op,
            f"top_p is {top_p:g}, expected 0 < top_p <= 1, the share of the softmax mass that "
            "lists must hold; pass None for lists of topk keys.",
        )
    if number != _EXACT or (top_p is None and per_head is None):
        return
    name = "topk_per_head" if top_p is None else "top_p"
    fail(
        op,
        f'{name} is given with selector="exact", expected None there, as it cuts lists of blocks '
        f'and "exact" selects single keys; pass None, or selector={BLOCK_NAMES}.',
    )


def per_head(tensor: Tensor | None, query: Argument, kv_heads: Any) -> None:
    if tensor is not None:
        contiguous(Argument(query.op, "topk_per_head", tensor), torch.int32, query, [kv_heads])


def ranking_scale(op: str, scale: float | None, number: int) -> None:
    if scale is None or number == _EXACT or scale > 0 or not math.isfinite(scale):
        return
    fail(
        op,
        f"scale is {scale:g}, expected scale > 0 because blocks are ranked by exp(scale * score); "
        "negate the query instead.",
    )


def head_dim(stage: str, size: Any) -> None:
    if holds(size >= 8) and holds(size <= MAX_HEAD_DIM) and holds(size % 8 == 0):
        return
    allowed = f"head_dim is {size}, expected a multiple of 8 from 8 to {MAX_HEAD_DIM}"
    if not holds(size <= MAX_HEAD_DIM) or not holds(size >= 1):
        fail(stage, f"{allowed}; use heads of at most {MAX_HEAD_DIM} elements.")
    fail(
        stage,
        f"{allowed}; pad the last dimension with zeros to {(size + 7) // 8 * 8} and keep the scale "
        "of the unpadded size.",
    )


def length(stage: str, name: str, size: Any, fix: str = "split the call") -> None:
    if not (holds(size >= 0) and holds(size < LENGTH_LIMIT)):
        fail(stage, f"{name} is {size}, expected 0 <= {name} < 2^31; {fix}.")


def problem(
    stage: str,
    query: Tensor,
    kv_len: Any,
    *,
    window: Any = 0,
    anchors: Any = 0,
    scale: float | None = None,
) -> None:
    """What csrc/host/validate.cc checks of a Problem."""
    for name, size in (("batch", query.shape[0]), ("query_len", query.shape[2])):
        length(stage, name, size)
    length(stage, "kv_len", kv_len)
    head_dim(stage, query.shape[3])
    for name, size in (("window", window), ("anchors", anchors)):
        length(stage, name, size, "pass 0 for none")
    if scale is not None and not abs(scale) <= torch.finfo(torch.float32).max:
        shown = scale if math.isnan(scale) else math.copysign(math.inf, scale)
        fail(
            stage,
            f"scale is {shown:g}, expected a finite number; pass None for 1/sqrt(head_dim).",
        )
