"""Fails when a source file includes something of a layer above it, or uses inline asm outside ptx.

The layers are those of docs/architecture.md: dependencies point downwards only, torch headers stay
in csrc/torch, pybind11 in csrc/python, CUDA headers out of the CPU code, inline asm in csrc/ptx.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

SOURCE_SUFFIXES = {".h", ".cuh", ".cc", ".cpp", ".cu"}


@dataclass(frozen=True)
class Layer:
    """What the files of one folder under csrc/ may include."""

    uses: tuple[str, ...]  # layers, or single files ("kernels/launchers.h")
    system: tuple[str, ...] = ()  # families of FAMILIES beyond the standard library


FAMILIES = {
    "torch": re.compile(r"^(torch|ATen|c10|aten|caffe2)/"),
    "pybind11": re.compile(r"^(pybind11/|Python\.h$)"),
    "cuda": re.compile(
        r"^(cuda|cuda_\w+|cuda_runtime_api|mma|cooperative_groups|sm_\d+\w*)(\.h$|/)"
    ),
}

# Leaves of host/ that every CPU layer needs: conversions of 16-bit numbers, making a Status.
CPU_LEAVES = ("host/number.h", "host/status.h")
LAYERS = {
    "torch": Layer(("torch", "include", "host"), ("torch",)),
    "python": Layer(("python", "include", "host"), ("pybind11",)),
    "include": Layer(("include",)),
    "host": Layer(("host", "include", "reference", "cpu", "kernels/launchers.h"), ("cuda",)),
    "cpu": Layer(("cpu", "reference", "include", *CPU_LEAVES)),
    "reference": Layer(("reference", "include", *CPU_LEAVES)),
    "kernels": Layer(("kernels", "device", "ptx", "include"), ("cuda",)),
    "device": Layer(("device", "ptx", "include"), ("cuda",)),
    "ptx": Layer(("ptx",), ("cuda",)),
}

INCLUDE = re.compile(r"^\s*#\s*include\s*([<\"])([^>\"]+)[>\"]", re.MULTILINE)
COMMENT_OR_STRING = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.DOTALL
)
INLINE_ASM = re.compile(r"\b(?:asm|__asm__|__asm)\b\s*(?:volatile|__volatile__)?\s*\(")


def blank(match: re.Match[str]) -> str:
    """Removes a comment or a string and keeps its line breaks, so that line numbers stay right."""
    return "\n" * match.group().count("\n")


def find_header(csrc: Path, source: Path, name: str) -> str | None:
    """The path below csrc/ that a quoted include means, or None when it is no file of ours."""
    for folder in (source.parent, csrc, csrc / "include"):
        candidate = (folder / name).resolve()
        if candidate.is_file() and candidate.is_relative_to(csrc):
            return candidate.relative_to(csrc).as_posix()
    return None


def include_fault(csrc: Path, source: Path, layer: Layer, quote: str, name: str) -> str | None:
    """What is wrong with one include of a file, or None."""
    for family, pattern in FAMILIES.items():
        if pattern.match(name):
            return None if family in layer.system else f"no {family} headers in this layer"
    if quote == "<":
        return "third-party headers are not allowed here" if "/" in name else None
    header = find_header(csrc, source, name)
    if header is None:
        return "no such header below csrc/"
    if header in layer.uses or header.split("/")[0] in layer.uses:
        return None
    return f"only these may be included from here: {', '.join(layer.uses)}"


def check_file(csrc: Path, source: Path) -> list[str]:
    """The faults of one file, each as 'path:line: message'."""
    relative = source.relative_to(csrc)
    layer = LAYERS.get(relative.parts[0])
    where = f"csrc/{relative.as_posix()}"
    if layer is None:
        return [f"{where}:1: this folder has no layer; add it to LAYERS in tools/check_includes.py"]
    text = source.read_text(encoding="utf-8")
    faults = []
    for match in INCLUDE.finditer(text):
        fault = include_fault(csrc, source, layer, match[1], match[2])
        if fault:
            line = text.count("\n", 0, match.start(2)) + 1
            faults.append(f"{where}:{line}: includes {match[2]}: {fault}")
    if relative.parts[0] != "ptx":
        code = COMMENT_OR_STRING.sub(blank, text)
        for match in INLINE_ASM.finditer(code):
            line = code.count("\n", 0, match.start()) + 1
            faults.append(
                f"{where}:{line}: inline asm belongs in csrc/ptx, one instruction a function"
            )
    return faults


def check_tree(csrc: Path) -> tuple[int, list[str]]:
    """Number of files read below `csrc`, and their faults."""
    csrc = csrc.resolve()
    files = sorted(p for p in csrc.rglob("*") if p.is_file() and p.suffix in SOURCE_SUFFIXES)
    return len(files), [fault for file in files for fault in check_file(csrc, file)]


def main() -> int:
    count, faults = check_tree(Path(__file__).resolve().parent.parent / "csrc")
    print("\n".join([*faults, f"includes: {count} files, {len(faults)} faults"]))
    return 1 if faults or count == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
