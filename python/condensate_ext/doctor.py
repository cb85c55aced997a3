"""``python -m condensate_ext doctor``: what is installed, what is found, whether it works."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import get_args

import torch

from condensate_ext import _loader

Line = tuple[str, str]


class _Findings:
    """Collects problems while the report is printed."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def missing(self, problem: str) -> str:
        self.problems.append(problem)
        return "MISSING"


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _versions(_: _Findings) -> Iterator[Line]:
    yield "condensate_ext", _package_version("condensate_ext")
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none: a CPU-only torch'}"


def _build(findings: _Findings) -> Iterator[Line]:
    if _loader.LOAD_ERROR is not None:
        yield "operators", findings.missing(_loader.LOAD_ERROR)
    else:
        yield "operators", f"{_loader.library_path()}"
    try:
        info = importlib.import_module("condensate_ext._C").build_info()
    except ImportError as error:
        yield "build facts", findings.missing(f"condensate_ext._C does not import: {error}")
        return
    yield "compiler", f"{info['compiler']}, headers of torch {info['torch_headers']}"
    if info["cuda"]:
        yield "CUDA kernels", f"nvcc {info['cuda_version']} for sm_{info['architectures']}"
    else:
        yield "CUDA kernels", "none in this build (nvcc was not found or was switched off)"
        if torch.cuda.is_available():
            findings.missing(
                "this machine has a GPU but the build has no CUDA kernels; put nvcc on PATH and "
                "run `pip install . --no-build-isolation` again."
            )


def _devices(findings: _Findings) -> Iterator[Line]:
    yield "CPU", f"{platform.machine()}, {torch.get_num_threads()} torch threads"
    if not torch.cuda.is_available():
        yield "GPU", "none that torch can use"
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        yield f"cuda:{index}", f"{properties.name}, compute capability {capability}"
        if (properties.major, properties.minor) < (8, 0):
            findings.missing(f"cuda:{index} has compute capability {capability}; 8.0 is needed.")


def _check_dense(device: str) -> str:
    """Compares a call that attends everything with torch's own attention."""
    from condensate_ext.ops import attention

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 4, 192, 64, generator=generator).to(device, dtype) for _ in range(3)
    )
    with torch.no_grad():
        ours = attention(query, key, value)
        dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    error = (ours.float() - dense.float()).abs().max().item()
    if not error < (1e-5 if device == "cpu" else 2e-2):
        raise RuntimeError(f"attention differs from dense attention by {error:.2e}")
    return f"attention agrees with torch's own, largest difference {error:.1e}"


def _check_selection(device: str) -> str:
    """Hides keys that outweigh all others where only a selection finds them."""
    from condensate_ext._selectors import Selector
    from condensate_ext.ops import attention_forward

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 1, 64, generator=generator).expand(-1, -1, 128, -1)
    key = 0.1 * torch.randn(1, 4, 2048, 64, generator=generator)
    hidden = slice(640, 704)
    key[:, :, hidden] += query[:, :, :1]
    value = torch.zeros(1, 4, 2048, 64)
    value[:, :, hidden] = 1
    tensors = [t.contiguous().to(device, dtype) for t in (query, key, value)]
    selectors = get_args(Selector)
    for selector in selectors:
        with torch.no_grad():
            out, _, omitted = attention_forward(*tensors, topk=64, selector=selector)
        found = out.float().min().item()
        if not (found > 0.6 and omitted.max().item() < 0.4):
            raise RuntimeError(f'selector "{selector}" missed keys of nearly all the mass: {found}')
    return f"every selector finds the keys of most mass: {', '.join(selectors)}"


def _self_check(findings: _Findings) -> Iterator[Line]:
    if _loader.LOAD_ERROR is not None:
        yield "self-check", "left out: the operators are not loaded"
        return
    devices = ["cpu"]
    has_kernels = importlib.import_module("condensate_ext._C").build_info()["cuda"]
    if torch.cuda.is_available() and has_kernels:
        devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for device in devices:
        for check in (_check_dense, _check_selection):
            try:
                yield device, check(device)
            except Exception as error:  # whatever it is, the report must say it
                yield device, findings.missing(f"self-check on {device} failed: {error}")


SECTIONS: dict[str, Callable[[_Findings], Iterator[Line]]] = {
    "Versions": _versions,
    "Build": _build,
    "Devices": _devices,
    "Self-check": _self_check,
}


def main(arguments: Sequence[str] = ()) -> int:
    """Prints the report; returns 0 when nothing is missing."""
    argparse.ArgumentParser(prog="condensate doctor", description=__doc__).parse_args(arguments)
    findings = _Findings()
    for title, section in SECTIONS.items():
        print(title)
        for name, text in section(findings):
            print(f"  {name:<16}{text}")
    print("\nNothing is missing." if not findings.problems else "\nMissing:")
    for problem in findings.problems:
        print(f"  - {problem}")
    return 1 if findings.problems else 0
