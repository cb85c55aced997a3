"""Every path can be forced, runs when forced, and meets the definition; plans say what ran."""

from __future__ import annotations

import condensate_ext
import pytest
import torch

from tests.testkit.cases import Case, from_seed
from tests.testkit.checks import check_case

ops = torch.ops.condensate
PATHS = {"cpu": ("cpu", "cpu_reference"), "cuda": ("sm80", "simt")}
OTHER_DEVICE = {"cpu": "sm80", "cuda": "cpu"}


def _all_ops(case: Case):
    """Runs every op that has a choice of path; yields the plan it followed."""
    query, key, value = case.tensors()
    common = {**case.range_args, "topk": 64}
    summaries = ops.block_summaries(key)
    lists = ops.select_blocks(query, summaries, kv_len=case.kv_len, **common)
    yield condensate_ext.last_plan()
    ops.select_tokens(query, key, **common)
    yield condensate_ext.last_plan()
    _, lse = ops.block_sparse_attention(query, key, value, *lists, **case.range_args)
    yield condensate_ext.last_plan()
    ops.omitted_mass(query, key, lse)
    yield condensate_ext.last_plan()


@pytest.mark.parametrize("choice", [0, 1])
def test_a_forced_path_is_the_one_that_runs(device, monkeypatch, choice):
    path = PATHS[device][choice]
    monkeypatch.setenv("CONDENSATE_FORCE_PATH", path)
    case = Case(device, dtype=torch.float16, kv_len=600)
    plans = list(_all_ops(case))
    stages = ["select_blocks", "select_tokens", "attention", "omitted_mass"]
    assert [plan.split(":")[0] for plan in plans] == stages
    assert all(f"path={path} (forced" in plan for plan in plans)


@pytest.mark.parametrize("choice", [0, 1])
@pytest.mark.parametrize("chunk", range(4))
def test_forced_paths_meet_the_definition(device, seed, monkeypatch, choice, chunk):
    path = PATHS[device][choice]
    monkeypatch.setenv("CONDENSATE_FORCE_PATH", path)
    checked = 0
    for case_seed in range(seed + 6 * chunk, seed + 6 * chunk + 6):
        case = from_seed(case_seed, device)
        runs_on_sm80 = case.dtype != torch.float32 and "misaligned" not in case.layouts
        if path == "sm80" and not runs_on_sm80:
            continue
        check_case(case)
        checked += 1
    assert checked > 0


def test_paths_without_force(device):
    half, single = (Case(device, dtype=t) for t in (torch.float16, torch.float32))
    expected = {"cpu": ("cpu", "cpu"), "cuda": ("sm80", "simt")}[device]
    for case, path in zip((half, single), expected, strict=True):
        assert all(f"path={path} (" in plan for plan in _all_ops(case))
    odd = Case(device, dtype=torch.float16, layouts=("misaligned",) * 3)
    assert all(f"path={expected[1]} (" in plan for plan in _all_ops(odd))


def test_a_path_that_cannot_run_is_refused(device, monkeypatch):
    monkeypatch.setenv("CONDENSATE_FORCE_PATH", OTHER_DEVICE[device])
    with pytest.raises(
        ValueError, match=r"CONDENSATE_FORCE_PATH is .*, which cannot run this call"
    ):
        next(_all_ops(Case(device)))
    monkeypatch.setenv("CONDENSATE_FORCE_PATH", "fastest")
    with pytest.raises(ValueError, match='CONDENSATE_FORCE_PATH is "fastest", expected cpu_ref'):
        next(_all_ops(Case(device)))
