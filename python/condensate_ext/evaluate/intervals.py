"""Confidence intervals of means over texts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

CONFIDENCE = 0.95
_GRID = 1 << 16


def student_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """How many standard errors to both sides of a mean hold it with this confidence.

    Student's t with ``degrees`` of freedom: with t = sqrt(degrees) tan(angle) its density is that
    of cos(angle) ** (degrees - 1).

    >>> round(student_quantile(1), 2), round(student_quantile(3), 3)
    (12.71, 3.182)
    """
    step = math.pi / 2 / _GRID
    middle = (torch.arange(_GRID, dtype=torch.float64) + 0.5) * step
    mass = middle.cos().pow(degrees - 1).cumsum(0)
    cells = int(torch.searchsorted(mass, confidence * mass[-1]))
    below = float(mass[cells - 1]) if cells else 0.0
    inside = (confidence * float(mass[-1]) - below) / (float(mass[cells]) - below)
    return math.sqrt(degrees) * math.tan((cells + inside) * step)


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean that more texts like these would have; None for one text.

    ``values`` are one a text; the interval takes texts as independent and their values as roughly
    normal.
    """
    if len(values) < 2:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = student_quantile(len(values) - 1) * error
    mean = statistics.fmean(values)
    return mean - half, mean + half
