"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL = Annotated[Path, typer.Option(help="Folder of a Hugging Face causal LM.")]
TEXT = Annotated[Path, typer.Option(help="Text file, documents separated by NUL.")]
CONTEXT = Annotated[
    int | None,
    typer.Option(help="Tokens. Default: 32768 on a GPU, 4096 on the CPU, if the model has it."),
]
DEVICE = Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")]
DTYPE = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16. Default: bfloat16 on a GPU, else float32."),
]
BATCH = Annotated[int, typer.Option(help="Texts or prompts at once: memory grows with it.")]
DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(dtype: str) -> None:
    """Raises ValueError for what is no dtype of weights."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is none: use {', '.join(DTYPES)}.")
