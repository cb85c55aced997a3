"""Reads a build log with ptxas -v: prints a table of the kernels, fails on what costs speed.

Faults: spills, local memory (a stack frame), serialised wgmma and every other ptxas warning, and a
log without kernels (a build that did nothing proves nothing). KNOWN_SPILLS excuses what is known
and bounded; growing past the bound is a fault again.
Usage: python tools/check_ptxas.py BUILD_LOG [BUILD_LOG ...]
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
PROPERTIES = re.compile(r"Function properties for (\S+)")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
# C7508 to C7515 say that wgmma was serialised; they appear as 'info' as well as 'warning'.
FATAL = re.compile(r"^\s*ptxas\b.*(?:warning|\(C75\d\d\)|serializ)", re.IGNORECASE)

# (architecture, kernel, template integers) -> most bytes of spill stores plus loads, either dtype.
# These run at the limit of registers (two CTAs an SM); fewer spills are welcome.
KNOWN_SPILLS = {
    ("sm_80", "attention_sm80_kernel", "Li128ELi2E"): 32,
    ("sm_80", "block_scan_kernel", "Li256ELi4E"): 40,
    ("sm_90", "block_refine_kernel", "Li128ELb0ELb0E"): 8,
    ("sm_90", "block_scan_kernel", "Li128ELi8ELNS_8SelectorE0ELb0E"): 12,
    ("sm_90", "block_scan_kernel", "Li256ELi4E"): 16,
    # float16 alone, where ptxas stops at 40 registers; more would cost resident CTAs.
    ("sm_90", "block_summary_kernel", "I6__halfLi8ELi64E"): 16,
    # With the far field. Before sm_90a the rows are made by a function of its own; on sm_90a by
    # warps that run on the registers which the consumers leave, and spill outside their loops.
    ("sm_80", "attention_sm80_kernel", "Li128ELi2ELb0ELb1E"): 400,
    ("sm_90", "attention_sm80_kernel", "Li128ELi2ELb0ELb1E"): 320,
    ("sm_80", "make_far_rows", "Li128ELi2ELb0ELb1E"): 4,
    ("sm_90", "make_far_rows", "Li128ELi2ELb0ELb1E"): 4,
    # These and `simt` also hold what the estimate of the omitted mass gathers; `simt` spills at its
    # beginning and end.
    ("sm_90", "attention_sm80_kernel", "Li256ELi1ELb0ELb1E"): 48,
    ("sm_80", "attention_simt_kernel", "Li128EEEv"): 8,
    ("sm_80", "attention_simt_kernel", "Li64EEEv"): 20,
    ("sm_90", "attention_simt_kernel", "Li128EEEv"): 20,
    ("sm_90", "attention_simt_kernel", "Li64EEEv"): 20,
    ("sm_90", "decode_dense_kernel", "Li256ELi1E"): 8,  # an address, outside its loop
    ("sm_90a", "attention_sm90_kernel", "Li1ELb1E"): 520,
    ("sm_90a", "attention_sm90_kernel", "Li2ELb1E"): 432,
}


@dataclass
class Function:
    """What ptxas reports about one kernel, or one function that a kernel calls."""

    name: str
    arch: str
    is_kernel: bool
    registers: int = 0
    smem_bytes: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0

    def excused_bytes(self) -> int:
        """Spills that KNOWN_SPILLS allows this function."""
        bounds = (
            bound
            for (arch, kernel, integers), bound in KNOWN_SPILLS.items()
            if arch == self.arch and kernel in self.name and integers in self.name
        )
        return max(bounds, default=0)

    def fault(self) -> str | None:
        if self.spill_bytes > self.excused_bytes():
            return f"spills {self.spill_bytes} bytes"
        if self.stack_bytes > self.spill_bytes:
            return f"uses {self.stack_bytes} bytes of local memory"
        return None


def parse(log: str) -> tuple[list[Function], list[str]]:
    """The functions that a build log reports, and its fatal ptxas lines."""
    functions: dict[tuple[str, str], Function] = {}
    fatal: list[str] = []
    arch, kernels = "?", set[tuple[str, str]]()
    current: Function | None = None
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            arch = entry[2]
            kernels.add((entry[1], arch))
        elif properties := PROPERTIES.search(line):
            key = (properties[1], arch)
            current = functions.setdefault(key, Function(*key, is_kernel=key in kernels))
        elif current and (frame := FRAME.search(line)):
            current.stack_bytes = int(frame[1])
            current.spill_bytes = int(frame[2]) + int(frame[3])
        elif current and (used := REGISTERS.search(line)):
            current.registers = int(used[1])
            shared = SHARED.search(line)
            current.smem_bytes = int(shared[1]) if shared else 0
        elif FATAL.search(line):
            fatal.append(line.strip())
    return list(functions.values()), list(dict.fromkeys(fatal))


def demangle(names: list[str]) -> list[str]:
    """Readable names where c++filt is there, without the parameter lists."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    text = subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return [short_name(name) for name in text.splitlines()]


def short_name(name: str) -> str:
    """`void a::b::f<(int)3>(float*)` as `f<3>`."""
    depth = 0
    for index, char in enumerate(name):
        depth += (char == "<") - (char == ">")
        if char == "(" and depth == 0 and not name.startswith("(anonymous namespace)", index):
            name = name[:index]
            break
    name = re.sub(r"\((?:int|long|bool|unsigned int)\)", "", name.removeprefix("void "))
    return re.sub(r"(?:\w+|\(anonymous namespace\))::", "", name)


def table(functions: list[Function]) -> str:
    """One line per kernel: what bounds its occupancy, and what it must not have."""
    rows = [f"{'registers':>9} {'smem':>7} {'stack':>6} {'spills':>6}  arch     kernel"]
    names = demangle([function.name for function in functions])
    for name, f in sorted(zip(names, functions, strict=True), key=lambda x: (x[0], x[1].arch)):
        rows.append(
            f"{f.registers:>9} {f.smem_bytes:>7} {f.stack_bytes:>6} {f.spill_bytes:>6}"
            f"  {f.arch:<8} {name}"
        )
    return "\n".join(rows)


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__)
        return 2
    log = "\n".join(Path(path).read_text(encoding="utf-8", errors="replace") for path in paths)
    functions, fatal = parse(log)
    kernels = [f for f in functions if f.is_kernel]
    faults = [f"{f.arch} {f.name}: {fault}" for f in functions if (fault := f.fault())]
    print(table(kernels))
    print("\n".join(faults + fatal))
    print(f"ptxas: {len(kernels)} kernels, {len(faults)} spill, {len(fatal)} warnings")
    if not kernels:
        print("ptxas: the log has no kernels; build from an empty folder with -Xptxas -v")
    return 1 if faults or fatal or not kernels else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
