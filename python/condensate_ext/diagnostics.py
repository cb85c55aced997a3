"""The plans of calls, the one that was followed last, and the sticky error word they leave."""

from __future__ import annotations

import ctypes
import enum
import functools
import json
from dataclasses import dataclass, field
from typing import Any

import torch

from condensate_ext import _loader
from condensate_ext._defaults import ANCHORS, TOPK, WINDOW
from condensate_ext._selectors import Selector, selector_number

_MESSAGE_BYTES = 512
_PLAN_BYTES = 8192


class ErrorWord(enum.IntFlag):
    """What was wrong in tensor *contents* since the word was last cleared; it was skipped."""

    NONE = 0
    BLOCK_INDEX = 1
    """A listed block was negative, out of range or not ascending."""
    BLOCK_COUNT = 2
    """A count of blocks or tokens was negative or exceeded its list's width."""
    ROW_INDEX = 4
    """A sampled query row was out of range."""
    CACHE_LENGTH = 8
    """A sequence's length was negative or beyond its pages."""
    BLOCK_TABLE = 16
    """A page that a sequence needs was negative or out of range."""
    TOKEN_INDEX = 32
    """A listed token was negative, not visible or not ascending."""


@dataclass(frozen=True)
class StagePlan:
    """One stage of a call: the path that it takes, why, and how its work is cut."""

    stage: str
    path: str
    reason: str
    """Why this path, or what ruled out a faster one."""
    work: int
    """Independent pieces of work, counted in ``unit``."""
    unit: str
    workspace_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a call does: which keys it attends, by which stages, in how much memory."""

    selection: str
    """``"covered"`` or ``"dense"`` (everything: the budget reaches every key, or selecting would
    not be faster), ``"blocks"``, ``"tokens"``, ``"given"`` (the caller's lists) or ``"none"``."""
    stages: tuple[StagePlan, ...]
    """In the order they run."""
    keys_per_query: int
    """What a full row attends to one by one, at most."""
    list_width: int
    """Blocks of a list."""
    summary_rows: int
    far_pools: int
    """Pools of a KV head; 0 without a far field."""
    tiles: int
    tile_positions: int
    workspace_bytes: int
    """Memory beside inputs and outputs."""
    text: str = field(repr=False)

    @property
    def attends_all(self) -> bool:
        """Does the call attend to every visible key, with nothing to select?"""
        return self.selection in ("covered", "dense")

    def stage(self, name: str) -> StagePlan:
        """The last stage of this name."""
        return next(stage for stage in reversed(self.stages) if stage.stage == name)

    def __str__(self) -> str:
        return self.text


def _plan_of(text: str) -> Plan:
    fields: dict[str, Any] = json.loads(text)
    stages = tuple(StagePlan(**stage) for stage in fields.pop("stages"))
    return Plan(stages=stages, **fields)


class _Shapes(ctypes.Structure):
    """CondensateShapes of csrc/torch/diagnostics.cc."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "dtype", "batch", "query_heads", "kv_heads", "query_len", "kv_len", "head_dim",
            "window", "anchors", "topk", "selector", "causal", "far_field", "estimate",
        )
    ]  # fmt: skip


@functools.cache
def _library() -> ctypes.CDLL:
    _loader.require()
    library = ctypes.CDLL(_loader.library_path())
    library.condensate_read_error_word.argtypes = [
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.POINTER(ctypes.c_uint32),
        ctypes.c_char_p,
        ctypes.c_int64,
    ]
    library.condensate_last_plan.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    library.condensate_last_plan.restype = None
    library.condensate_plan.argtypes = [
        ctypes.POINTER(_Shapes),
        ctypes.c_int32,
        ctypes.c_char_p,
        ctypes.c_int64,
    ]
    return library


def read_error_word(
    device: torch.device | str | int | None = None, *, clear: bool = True
) -> ErrorWord:
    """Reads the error word of a device; on CUDA this waits for the current stream.

    Args:
        device: ``"cpu"``, a CUDA device or its index. Default: the current CUDA device, or the CPU
            when there is none.
        clear: set the word back to 0, so that the next read tells about later calls only.

    Returns:
        The bits set since the word was last cleared, ``ErrorWord.NONE`` when all was well.

    Raises:
        RuntimeError: the device cannot be read, for example while a CUDA graph is captured.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    target = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    index = -1
    if target.type == "cuda":
        index = torch.cuda.current_device() if target.index is None else target.index
    word = ctypes.c_uint32(0)
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    read = _library().condensate_read_error_word
    if read(index, int(clear), ctypes.byref(word), message, _MESSAGE_BYTES) != 0:
        raise RuntimeError(message.value.decode())
    return ErrorWord(word.value)


def last_plan() -> Plan:
    """The plan of this thread's last call: what it selected, and each stage that ran."""
    text = ctypes.create_string_buffer(_PLAN_BYTES)
    _library().condensate_last_plan(text, len(text))
    return _plan_of(text.value.decode())


def plan(
    *,
    batch: int,
    query_heads: int,
    kv_heads: int,
    query_len: int,
    kv_len: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    window: int = WINDOW,
    anchors: int = ANCHORS,
    topk: int = TOPK,
    selector: Selector = "block",
    causal: bool = True,
    far_field: bool | None = None,
    estimate: bool = False,
    device: torch.device | str = "cpu",
) -> Plan:
    """The plan that ``attention`` follows with contiguous tensors of these sizes.

    Args:
        estimate: as ``attention_forward``, which also estimates the omitted mass.
        far_field: as ``attention``, by default on where the selector lists blocks.
        device: where the tensors are.

    Raises:
        ValueError: an argument is out of range.
    """
    condenses = selector != "exact" if far_field is None else far_field
    shapes = _Shapes(
        (torch.float16, torch.bfloat16, torch.float32).index(dtype),
        batch, query_heads, kv_heads, query_len, kv_len, head_dim, window, anchors, topk,
        selector_number("plan", selector), causal, condenses, estimate,
    )  # fmt: skip
    target = torch.device(device)
    index = -1
    if target.type == "cuda":
        index = torch.cuda.current_device() if target.index is None else target.index
    text = ctypes.create_string_buffer(_PLAN_BYTES)
    if _library().condensate_plan(ctypes.byref(shapes), index, text, len(text)) != 0:
        raise ValueError(text.value.decode())
    return _plan_of(text.value.decode())
