"""Devices and the seed of a run. The same tests run on the CPU and, marked gpu, on CUDA."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.testkit.error_word import left_set

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "model: needs the trained model (CONDENSATE_SHARED)")
    # Workers of pytest-xdist inherit the environment, so the whole run shares one seed.
    os.environ.setdefault("CONDENSATE_TEST_SEED", str(random.SystemRandom().randrange(10**9)))


def pytest_report_header() -> str:
    return f"CONDENSATE_TEST_SEED={os.environ['CONDENSATE_TEST_SEED']}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device: torch.cuda.is_available() is false")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """ "cpu" or "cuda"."""
    return str(request.param)


@pytest.fixture
def seed() -> int:
    """Fresh in every run unless CONDENSATE_TEST_SEED fixes it."""
    return int(os.environ["CONDENSATE_TEST_SEED"])


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For many small passes of a model: threads would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def published_model() -> Path:
    """Folder of SmolLM2-135M-Instruct, made once and kept under build/, or a skip that says why."""
    pytest.importorskip("transformers", minversion="5.0")
    from tools import published_model

    try:
        return published_model.make()
    except published_model.UnavailableError as error:
        pytest.skip(f"no published model: {error}")


@pytest.fixture(autouse=True)
def _clean_error_word() -> Iterator[None]:
    """No test leaves a sticky error bit to the next one, or sets one that it did not mean to."""
    yield
    left = left_set()
    assert not left, f"the test left the error word set: {left}"
