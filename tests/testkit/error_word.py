"""The sticky error word between tests."""

from __future__ import annotations

import torch
from condensate_ext import ErrorWord, _loader, read_error_word


def left_set() -> dict[str, ErrorWord]:
    """Error words that are set, by device; clears them."""
    if _loader.LOAD_ERROR is not None:
        return {}
    # Without CUDA initialised no kernel of this process has run there.
    devices = ["cpu", "cuda"] if torch.cuda.is_initialized() else ["cpu"]
    words = {device: read_error_word(device) for device in devices}
    return {device: word for device, word in words.items() if word}
