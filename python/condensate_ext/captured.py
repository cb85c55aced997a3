"""The attention layer that the demo shows: queries, keys and values of a trained model.

It is a package of its own, `examples/demo_layer`; `tools/capture_layer.py` wrote it. The text asks
at its end for a code stated far before; the layer is one whose heads look it up.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor

PACKAGE = "condensate_ext_demo"
HEAD = 1  # a head that looks the statement up, the one worth drawing


@dataclass(frozen=True)
class CapturedLayer:
    """One layer of a text; the shapes in brackets are those of the demo's."""

    query: Tensor  # [1, 8, 1024, 128] float32, positions encoded: the last queries of the text
    key: Tensor  # [1, 2, 6144, 128] float32
    value: Tensor  # [1, 2, 6144, 128] float32
    model: str
    layer: int
    # half-open range of keys: the line that the last query asks for; None where it asks for none
    statement: tuple[int, int] | None


def _dequantise(arrays: Any, name: str) -> Tensor:
    rows = arrays[name].astype(np.float32) * arrays[f"{name}_scale"].astype(np.float32)
    return torch.from_numpy(rows)


def load() -> CapturedLayer:
    """Reads the layer; rows are int8 with a scale each, so close to the model's own.

    Raises:
        ImportError: its package is not installed.
    """
    try:
        source = resources.files(PACKAGE) / "captured_layer.npz"
    except ModuleNotFoundError:
        raise ImportError(
            f"the demo's layer is in the package {PACKAGE}, which is not installed; in the source "
            "tree `pip install ./examples/demo_layer` adds it, or pass --model and --text."
        ) from None
    with resources.as_file(source) as path, np.load(path) as arrays:
        begin, end = (int(position) for position in arrays["statement"])
        return CapturedLayer(
            query=_dequantise(arrays, "query"),
            key=_dequantise(arrays, "key"),
            value=_dequantise(arrays, "value"),
            model=str(arrays["model"]),
            layer=int(arrays["layer"]),
            statement=(begin, end),
        )
