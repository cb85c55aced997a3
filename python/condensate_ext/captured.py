"""The attention layer that ships with the package: queries, keys and values of a trained model.

`tools/capture_layer.py` wrote it. The text asks at its end for a code stated far before; the layer
is one whose heads look it up.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor

HEAD = 1  # a head that looks the statement up, the one worth drawing


@dataclass(frozen=True)
class CapturedLayer:
    """One layer of a text; the shapes in brackets are those of the shipped one."""

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
    """Reads the shipped layer; rows are int8 with a scale each, so close to the model's own."""
    source = resources.files("condensate_ext") / "data" / "captured_layer.npz"
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
