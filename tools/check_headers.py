"""Fails when a header does not compile alone: each must include what it uses and be guarded.

Every header becomes a translation unit that includes it twice. Host headers go through g++,
those of the device layers through nvcc's front end. A header that passed is not compiled again
until it or something it includes changes (remembered in build/, keyed by the preprocessed text).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
WARNINGS = ("-Wall", "-Wextra", "-Werror")
DEVICE_LAYERS = {"kernels", "device", "ptx"}
HOST_VIEW = {CSRC / "kernels/launchers.h"}  # what host code sees of the kernels


def package_folder(package: str) -> Path | None:
    """Where an importable package lives, found without importing it."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def cuda_include() -> Path | None:
    """The include folder of the toolkit that nvcc belongs to."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    for line in dry_run.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip()).resolve() / "include"
    return None


def host_command(cuda: Path | None) -> list[str]:
    """g++ with every include folder that a host layer may use."""
    command = ["g++", "-std=c++17", "-fsyntax-only", "-fvisibility=hidden", *WARNINGS, "-x", "c++"]
    command += [f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    torch, pybind = package_folder("torch"), package_folder("pybind11")
    if torch:
        command += ["-isystem", str(torch / "include"), "-DTORCH_STABLE_ONLY"]
        command += ["-DTORCH_TARGET_VERSION=0x020B000000000000ULL"]
    if pybind:
        command += ["-isystem", str(pybind / "include")]
        command += ["-isystem", sysconfig.get_path("include")]
    if cuda:
        command += ["-isystem", str(cuda)]
    return command


def device_command() -> list[str]:
    """nvcc's device front end; sm_90a, so that headers for Hopper show all of their text."""
    command = ["nvcc", "-std=c++17", "-arch=sm_90a", "-ptx", "-Werror", "all-warnings"]
    return [*command, f"-I{CSRC}", f"-I{CSRC / 'include'}", "-x", "cu", "-o", os.devnull]


def needs_missing(header: Path, cuda: Path | None) -> str | None:
    """Why a header cannot be compiled on this machine, or None."""
    layer = header.relative_to(CSRC).parts[0]
    if cuda is None and (layer in DEVICE_LAYERS or b"cuda_runtime" in header.read_bytes()):
        return "no nvcc"
    if layer == "torch" and package_folder("torch") is None:
        return "no torch"
    if layer == "python" and package_folder("pybind11") is None:
        return "no pybind11"
    return None


def compile_alone(header: Path, command: list[str], folder: Path) -> str | None:
    """The compiler's complaint about a header on its own, or None."""
    name = header.relative_to(CSRC).as_posix()
    unit = folder / (name.replace("/", "__") + ".cc")
    unit.write_text(f'#include "{header}"\n#include "{header}"  // guarded?\n', encoding="utf-8")
    preprocess = [a for a in command if a not in ("-fsyntax-only", "-ptx")]
    if "-o" in preprocess:
        preprocess = preprocess[: preprocess.index("-o")]
    text = subprocess.run([*preprocess, "-E", str(unit)], capture_output=True, check=False).stdout
    stamp = unit.with_suffix(".ok")
    key = hashlib.sha256(" ".join(command).encode() + text).hexdigest()
    if text and stamp.is_file() and stamp.read_text() == key:
        return None
    result = subprocess.run([*command, str(unit)], capture_output=True, text=True, check=False)
    if result.returncode == 0:
        stamp.write_text(key)
        return None
    return f"csrc/{name} does not compile alone:\n{(result.stdout + result.stderr).strip()}"


def headers() -> Iterator[Path]:
    for path in sorted(CSRC.rglob("*")):
        if path.is_file() and path.suffix in {".h", ".cuh"}:
            yield path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "header_check")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    cuda = cuda_include()
    host, device = host_command(cuda), device_command()
    found, skipped = [], []
    for header in headers():
        reason = needs_missing(header, cuda)
        if reason:
            skipped.append(f"SKIPPED csrc/{header.relative_to(CSRC)}: {reason}")
        else:
            found.append(header)

    def check(header: Path) -> str | None:
        on_device = header.relative_to(CSRC).parts[0] in DEVICE_LAYERS and header not in HOST_VIEW
        return compile_alone(header, device if on_device else host, options.folder)

    with ThreadPoolExecutor(options.jobs) as pool:
        faults = [fault for fault in pool.map(check, found) if fault]
    print("\n".join([*skipped, *faults]))
    print(f"headers: {len(found)} compiled alone, {len(faults)} faults, {len(skipped)} skipped")
    return 1 if faults or not found else 0


if __name__ == "__main__":
    sys.exit(main())
