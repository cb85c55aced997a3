"""Loads the compiled operators, and keeps the reason when that is not possible."""

from __future__ import annotations

import importlib.util

import torch

MINIMUM_TORCH = (2, 11)


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def library_path() -> str | None:
    """Path of the operator library, or None when this installation has none."""
    # In an editable install __file__ is the source tree; the spec knows where the library went.
    spec = importlib.util.find_spec("condensate_ext._ops")
    return spec.origin if spec is not None else None


def _load() -> str | None:
    """Registers the operators with torch. Returns what went wrong, or None."""
    if _torch_version() < MINIMUM_TORCH:
        wanted = ".".join(map(str, MINIMUM_TORCH))
        return f"torch {torch.__version__} is installed, but torch>={wanted} is needed; upgrade it."
    path = library_path()
    if path is None:
        return (
            "the compiled operators (condensate_ext/_ops.abi3.so) are not installed; run "
            "`pip install . --no-build-isolation` in the source tree."
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load under torch {torch.__version__}: {error}"
    return None


LOAD_ERROR: str | None = _load()


def require() -> None:
    """Raises ImportError, saying what is missing, when the operators are not loaded."""
    if LOAD_ERROR is not None:
        raise ImportError(
            f"condensate_ext: {LOAD_ERROR} `python -m condensate_ext doctor` shows more."
        )
