"""Opens a language model that somebody else may have made: weights as safetensors only, no pickle,
no code that came with it, nothing from the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_SAFELY: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def check_folder(folder: Path, option: str = "--model") -> None:
    """Raises ValueError unless the folder holds a model whose weights are safetensors; ``option``
    is what the message calls the folder."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{option} {folder} has no config.json: give a folder of a Hugging Face LM."
        )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{option} {folder} has no *.safetensors, expected weights in that format, as other "
            "ones are pickles, which can run code; convert the model with save_pretrained()."
        )


def load_tokenizer(folder: Path, option: str = "--model") -> Any:
    """The tokenizer of a Hugging Face folder; raises as :func:`load_causal_lm` does."""
    from transformers import AutoTokenizer

    check_folder(folder, option)
    return AutoTokenizer.from_pretrained(folder, **_SAFELY)


def load_causal_lm(folder: Path, dtype: torch.dtype, option: str = "--model") -> tuple[Any, Any]:
    """The tokenizer and the model of a Hugging Face folder, with torch's SDPA.

    Raises:
        ValueError: the folder is none, has no safetensors, or its model needs code of its own;
            ``option`` is what the message calls the folder.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(folder, option)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, **_SAFELY
    )
    return tokenizer, model.eval()
