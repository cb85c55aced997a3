"""The examples run and say what they claim."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "context_parallel.py"


@pytest.mark.slow
def test_two_processes_compute_what_one_does():
    """float32: 12 rounding steps of values below 4, far less than a dropped key would change."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", str(EXAMPLE)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"largest difference (\S+), log-sum-exp (\S+)", done.stdout)
    assert found and "2 processes, gloo" in done.stdout
    assert float(found[1]) < 3e-6 and float(found[2]) < 5e-6
    assert "tensor parallel: equal" in done.stdout
