"""What a wheel holds and needs: `python tools/check_wheel.py WHEEL [--manylinux 2_28]`.

Fails where a wheel that ought to run elsewhere would not: a library that is linked by path or is
not there on every Linux, a symbol of a newer glibc, a Python symbol in the stable-ABI library, a
file that is none of the package's.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# Torch's are in the process before ours are loaded; the others are manylinux's.
NEEDED = re.compile(
    r"lib(torch|torch_cpu|torch_cuda|c10|c10_cuda|stdc\+\+|gcc_s|m|c|pthread|dl|rt)\.so.*"
    r"|ld-linux-.*"
)
FILES = re.compile(r"condensate_ext/.*\.(py|so|npz)|condensate_ext/py\.typed|[^/]*\.dist-info/.*")


def readelf(library: Path, *options: str) -> str:
    command = ["readelf", "--wide", *options, str(library)]
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout


def newest(versions: list[str]) -> tuple[int, ...]:
    return max((tuple(map(int, v.split("."))) for v in versions), default=(0,))


def faults_of_library(library: Path, glibc: tuple[int, ...] | None) -> list[str]:
    dynamic, symbols = readelf(library, "--dynamic"), readelf(library, "--dyn-syms")
    name, faults = library.name, []
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    faults += [f"{name} needs {other}" for other in needed if not NEEDED.fullmatch(other)]
    if "RPATH" in dynamic or "RUNPATH" in dynamic:
        faults.append(f"{name} has a path of its own to look for libraries")
    found = newest(re.findall(r"@GLIBC_([\d.]+)", symbols))
    if glibc and found > glibc:
        faults.append(f"{name} needs glibc {'.'.join(map(str, found))}")
    if ".abi3." in name and re.search(r"UND _?Py[A-Z_]", symbols):
        faults.append(f"{name} uses symbols of Python")
    print(f"{name}: {library.stat().st_size / 2**20:.1f} MiB, glibc {'.'.join(map(str, found))}, "
          f"needs {', '.join(needed)}")  # fmt: skip
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--manylinux", help="largest glibc, e.g. 2_28; default: any")
    options = parser.parse_args()
    glibc = tuple(map(int, options.manylinux.split("_"))) if options.manylinux else None
    faults = []
    with zipfile.ZipFile(options.wheel) as wheel, tempfile.TemporaryDirectory() as folder:
        names = wheel.namelist()
        faults += [f"{name} is in the wheel" for name in names if not FILES.fullmatch(name)]
        libraries = [name for name in names if name.endswith(".so")]
        if not any(name.endswith("_ops.abi3.so") for name in libraries):
            faults.append("the operators are not in the wheel")
        for name in libraries:
            faults += faults_of_library(Path(wheel.extract(name, folder)), glibc)
    size = options.wheel.stat().st_size / 2**20
    print(f"{options.wheel.name}: {size:.1f} MiB, {len(names)} files, {len(faults)} faults")
    print(*(f"  - {fault}" for fault in faults), sep="\n", end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
