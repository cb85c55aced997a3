"""What calls leave behind: the sticky error word, and the plan that was followed last."""

from __future__ import annotations

import ctypes
import enum
import functools

import torch

from condensate_ext import _loader

_MESSAGE_BYTES = 512


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


def last_plan() -> str:
    """One line on the last stage that this thread ran: its path, why it was taken, its work.

    ``attention`` runs several stages; its last one is the attention itself.
    """
    text = ctypes.create_string_buffer(2 * _MESSAGE_BYTES)
    _library().condensate_last_plan(text, len(text))
    return text.value.decode()
