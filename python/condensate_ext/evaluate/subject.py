"""What is evaluated: a model on its device, its tokenizer, and windows of text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condensate_ext.evaluate.text import Window, read_windows
from condensate_ext.model_files import load_causal_lm

_GPU_CONTEXT, _CPU_CONTEXT = 32768, 4096


@dataclass(frozen=True)
class Subject:
    """One document a window; ``batch`` of them go through the model at once."""

    model: Any
    tokenizer: Any
    windows: list[Window]
    context: int  # tokens; a window has one more, the last one's target
    batch: int

    def ids(self, windows: list[Window], tokens: int) -> Tensor:
        """The first tokens of some windows: ``[B, tokens]`` int64 on the model's device."""
        return torch.tensor([w.ids[:tokens] for w in windows], device=self.model.device)

    def batches(self, tokens: int) -> Iterator[Tensor]:
        """The first tokens of all windows, ``[B, tokens]`` with at most ``batch`` rows."""
        for begin in range(0, len(self.windows), self.batch):
            yield self.ids(self.windows[begin : begin + self.batch], tokens)

    @property
    def batch_count(self) -> int:
        return -(-len(self.windows) // self.batch)


def default_dtype(device: str) -> str:
    return "bfloat16" if torch.device(device).type == "cuda" else "float32"


def context_of(wanted: int | None, config: Any, device: str) -> int:
    """Tokens to evaluate at, by a model's configuration; raises ValueError for too many."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if wanted is None:
        usual = _GPU_CONTEXT if torch.device(device).type == "cuda" else _CPU_CONTEXT
        return min(usual, limit or usual)
    if limit is not None and wanted > limit:
        raise ValueError(
            f"--context {wanted} exceeds the {limit} positions of this model "
            f"(max_position_embeddings); use {limit} or less."
        )
    return wanted


def load(
    model: Path,
    text: Path,
    *,
    context: int | None,
    documents: int,
    batch: int,
    dtype: str,
    device: str,
) -> Subject:
    """Loads a Hugging Face causal LM folder with torch's SDPA, the dense baseline, and a text.

    ``context`` is 32,768 tokens by default, 4,096 on the CPU, or what the model has positions for.

    Raises:
        ValueError: a path, the context or the text does not do.
    """
    if not text.is_file():
        raise ValueError(f"--text {text} is no file: give a text, documents separated by NUL.")
    tokenizer, loaded = load_causal_lm(model, getattr(torch, dtype))
    loaded = loaded.to(device)
    tokens = context_of(context, loaded.config, device)
    windows = read_windows(text, tokenizer, tokens + 1, documents)
    return Subject(loaded, tokenizer, windows, tokens, batch)
