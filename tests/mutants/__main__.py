"""Plants every fault in a copy of the sources, builds it, and asserts that its tests turn red.

    python -m tests.mutants [--device cpu|cuda] [--only NAME] [--list]

First the copy is built and tested unharmed: a test that is red anyway proves nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.mutants.catalogue import ALL, Mutant

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("CMakeLists.txt", "pyproject.toml", "cmake", "csrc", "python", "tests")
TIMEOUT_S = 600
GREEN, RED = 0, 1


class Copy:
    """A copy of the sources with a build folder and a folder to import the package from."""

    def __init__(self, folder: Path, device: str) -> None:
        self.tree, self.build, self.package = folder / "src", folder / "build", folder / "package"
        self.device = device
        for name in SOURCES:
            source, target = ROOT / name, self.tree / name
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                target.parent.mkdir(exist_ok=True)
                shutil.copy(source, target)
        major, minor = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
        options = [
            f"-DCONDENSATE_CUDA={'ON' if device == 'cuda' else 'OFF'}",
            f"-DCONDENSATE_ARCHS={major}{minor}" if device == "cuda" else "-DCONDENSATE_ARCHS=",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        run(["cmake", "-S", str(self.tree), "-B", str(self.build), *generator, *options])

    def make(self) -> None:
        """Builds and lays out the package."""
        run(["cmake", "--build", str(self.build), "--parallel", str(os.cpu_count())])
        shutil.rmtree(self.package, ignore_errors=True)
        shutil.copytree(self.tree / "python", self.package)
        for library in self.build.glob("*.so"):
            shutil.copy(library, self.package / "condensate_ext")

    def test(self, mutant: Mutant) -> tuple[int, str]:
        """Exit status of the mutant's tests, and the end of their output."""
        file, expression = mutant.tests.split(" ", 1)
        command = [
            sys.executable, "tests/mutants/run_tests.py", str(self.package), f"tests/{file}", "-k",
            f"({expression}) and {self.device}", "-x", "-q", "-p", "no:cacheprovider",
            "-p", "no:xdist", "-rN", "--no-header", "--tb=line",
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, cwd=self.tree, text=True, capture_output=True, timeout=TIMEOUT_S,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return RED, "ran past its time"
        return done.returncode, (done.stdout + done.stderr).strip()[-400:]


def run(command: list[str]) -> None:
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-3000:]}")


def plant(tree: Path, mutant: Mutant) -> None:
    """Applies the replacement; the sources must hold the searched text exactly once."""
    path = tree / "csrc" / mutant.file
    text = path.read_text()
    if text.count(mutant.search) != 1:
        found = text.count(mutant.search)
        raise RuntimeError(f"{mutant.name}: {mutant.file} holds {mutant.search!r} {found} times")
    path.write_text(text.replace(mutant.search, mutant.replacement))


def is_killed(status: int) -> bool:
    """Red, or a crash of the test process; not an empty selection or a usage error."""
    return status == RED or status < 0


def hunt(mutants: list[Mutant], device: str) -> list[str]:
    """Names of the faults that lived."""
    with tempfile.TemporaryDirectory(prefix="condensate-mutants-") as folder:
        copy = Copy(Path(folder), device)
        copy.make()
        for tests in {m.tests: m for m in mutants}.values():
            status, output = copy.test(tests)
            if status != GREEN:
                raise RuntimeError(f"{tests.tests} is not green without a fault:\n{output}")
        lived = []
        for mutant in mutants:
            begin = time.monotonic()
            plant(copy.tree, mutant)
            copy.make()
            status, output = copy.test(mutant)
            killed = is_killed(status)
            print(f"{'killed' if killed else 'LIVED '} {mutant.name} "
                  f"({time.monotonic() - begin:.0f} s)", flush=True)  # fmt: skip
            if not killed:
                lived.append(f"{mutant.name} (status {status}): {output}")
            path = copy.tree / "csrc" / mutant.file
            path.write_text((ROOT / "csrc" / mutant.file).read_text())
        return lived


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: all that are here")
    parser.add_argument("--only", action="append", help="a fault's name; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    options = parser.parse_args()
    lived = []
    for device in [options.device] if options.device else devices:
        chosen = [m for m in ALL if m.device == device]
        chosen = [m for m in chosen if not options.only or m.name in options.only]
        if options.list:
            print(*(f"{m.device:5} {m.name:36} {m.file}" for m in chosen), sep="\n")
        elif chosen:
            lived += hunt(chosen, device)
    print(*lived, sep="\n")
    return 1 if lived else 0


if __name__ == "__main__":
    sys.exit(main())
