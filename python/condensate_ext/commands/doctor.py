"""``condensate doctor``: what is installed, what is found, whether it works."""

from __future__ import annotations

import importlib
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import torch
import typer

from condensate_ext import _loader
from condensate_ext.commands import checks

Line = tuple[str, str]
_OPTIONAL = ("transformers", "safetensors", "matplotlib", "lm_eval")


class Findings:
    """Collects problems while the report is made."""

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


def _versions(_: Findings) -> Iterator[Line]:
    yield "condensate_ext", _package_version("condensate_ext")
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none: a CPU-only torch'}"
    for name in _OPTIONAL:
        yield name, _package_version(name)


def _build(findings: Findings) -> Iterator[Line]:
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


def _devices(findings: Findings) -> Iterator[Line]:
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


def _kernels(findings: Findings) -> Iterator[Line]:
    """What a usual call runs on each device, and what ruled out a faster path."""
    if _loader.LOAD_ERROR is not None:
        yield "plan", "left out: the operators are not loaded"
        return
    from condensate_ext.diagnostics import plan

    for device in checks.devices():
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        try:
            stages = plan(
                batch=1, query_heads=32, kv_heads=8, query_len=16384, kv_len=16384, head_dim=128,
                dtype=dtype, device=device,
            ).stages  # fmt: skip
        except (ValueError, RuntimeError) as error:
            yield device, findings.missing(f"no plan of a call on {device}: {error}")
            continue
        for stage in stages:
            yield f"{device} {stage.stage}", f"{stage.path}: {stage.reason or 'the fastest'}"


def _self_check(findings: Findings, found: list[checks.Check]) -> Iterator[Line]:
    if _loader.LOAD_ERROR is not None:
        yield "self-check", "left out: the operators are not loaded"
        return
    for check in checks.run():
        found.append(check)
        where = f"{check.device} {check.path}"
        detail = f"{check.name}: {check.status}, {check.detail}"
        if check.status == "failed":
            detail = findings.missing(
                f"self-check of {check.name} on {where} failed: {check.detail}"
            )
        yield where, detail


def report(show: Callable[[str], None]) -> dict[str, Any]:
    """Tells every finding as it is made, and returns all of them."""
    findings, tried = Findings(), list[checks.Check]()
    sections: dict[str, Iterator[Line]] = {
        "Versions": _versions(findings),
        "Build": _build(findings),
        "Devices": _devices(findings),
        "Kernels of bfloat16 prefill (float32 on the CPU)": _kernels(findings),
        "Self-check": _self_check(findings, tried),
    }
    document: dict[str, Any] = {}
    for title, lines in sections.items():
        show(title)
        facts: list[Line] = []
        for name, text in lines:
            facts.append((name, text))
            show(f"  {name:<28}{text}")
        document[title.split(" of ")[0].lower()] = dict(facts)
    document["self-check"] = [asdict(check) for check in tried]
    document["problems"] = findings.problems
    return document


def command(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead of lines.")
    ] = False,
) -> None:
    """Checks the installation.

    Shows versions, devices and kernels, and what ruled out a faster one; then runs dense attention,
    selection, far field and decoding over a cache on every path. Exits
    with 1 when something is missing or wrong.
    """
    document = report((lambda _: None) if as_json else print)
    problems = document["problems"]
    if as_json:
        print(json.dumps(document, indent=1))
    else:
        print("\nNothing is missing." if not problems else "\nMissing:")
        for problem in problems:
            print(f"  - {problem}")
    raise typer.Exit(1 if problems else 0)
