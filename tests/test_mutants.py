"""The kept faults still apply to the sources. `python -m tests.mutants` plants them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.catalogue import ALL, CPU, CUDA

ROOT = Path(__file__).resolve().parents[1]


def test_enough_faults_are_kept():
    assert len(CPU) >= 12 and len(CUDA) >= 4
    assert len({mutant.name for mutant in ALL}) == len(ALL)


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_fault_applies_to_the_sources(mutant):
    source = (ROOT / "csrc" / mutant.file).read_text()
    assert source.count(mutant.search) == 1, "adapt tests/mutants/catalogue.py to the new source"
    assert mutant.replacement not in source or not mutant.replacement
    file, _ = mutant.tests.split(" ", 1)
    assert (ROOT / "tests" / file).is_file()
