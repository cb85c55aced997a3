"""Fresh random calls against the definition: numbers, log-sum-exp, membership, selection."""

from __future__ import annotations

import pytest

from tests.testkit.cases import from_seed
from tests.testkit.checks import check_case
from tests.testkit.repro import line

CONFIGURATIONS = {"cpu": 240, "cuda": 2000}
CHUNKS = 20


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_configurations(device, seed, chunk):
    count = CONFIGURATIONS[device] // CHUNKS
    outcomes = []
    for case_seed in range(seed + chunk * count, seed + (chunk + 1) * count):
        try:
            outcomes.append(check_case(from_seed(case_seed, device)))
        except Exception as error:
            raise AssertionError(f"{error}\nagain: {line(device, case_seed)}") from error
    assert sum(outcome.probes for outcome in outcomes) >= 500 * count  # 10^6 on CUDA
