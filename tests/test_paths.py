"""Every path can be forced, runs when forced, and meets the definition; plans say what ran."""

from __future__ import annotations

import condensate_ext
import condensate_ext as ops
import pytest
import torch
from condensate_ext._token_selection import select_tokens

from tests.testkit.cases import Case, from_seed
from tests.testkit.checks import check_case
from tests.testkit.definition import tile_positions

PATHS = {"cpu": ("cpu", "cpu_reference"), "cuda": ("sm80", "simt", "sm90")}
OTHER_DEVICE = {"cpu": "sm80", "cuda": "cpu"}
WITH_SM90 = ("select_blocks", "attention")  # stages with kernels of their own
EDGES = [(63, 129), (64, 128), (65, 127), (127, 193), (128, 192), (129, 191), (64, 1), (300, 130)]


def has_sm90() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def path_of(device: str, choice: int) -> str:
    """The device's path of this number, or a skip that says why."""
    if choice >= len(PATHS[device]):
        pytest.skip(f"{device} has {len(PATHS[device])} paths")
    if PATHS[device][choice] == "sm90" and not has_sm90():
        pytest.skip("the GPU's compute capability is not 9.0")
    return PATHS[device][choice]


def scans_by_mma(case: Case) -> bool:
    """Are the case's lists given, or few enough query heads and summary elements to scan for?"""
    if case.selector not in ("block", "quest", "mean"):
        return True
    widest = 32 if case.selector == "block" else 16
    elements = case.head_dim * (2 if case.selector == "quest" else 1)
    return case.group <= widest and elements <= 256


def runs_on(case: Case, path: str) -> bool:
    """Can the path take a list-given call of this case?"""
    half = case.dtype != torch.float32 and "misaligned" not in case.layouts
    if path != "sm90":
        return path != "sm80" or (half and scans_by_mma(case))
    positions = tile_positions(case.group)
    shared = "head_shared" in case.layouts and case.batch > 1
    whole_tiles = positions >= 8 and case.query_len >= positions and case.kv_len > 0
    return half and whole_tiles and case.head_dim in (64, 128) and not shared


def _all_ops(case: Case):
    """Runs every op that has a choice of path; yields the plan it followed."""
    query, key, value = case.tensors()
    common = {**case.range_args, "topk": 64}
    summaries = ops.block_summaries(key)
    lists = ops.select_blocks(query, summaries, kv_len=case.kv_len, **common)
    yield condensate_ext.last_plan()
    select_tokens(query, key, **common)
    yield condensate_ext.last_plan()
    _, lse = ops.block_sparse_attention(query, key, value, *lists, **case.attention_args)
    yield condensate_ext.last_plan()
    ops.omitted_mass(query, key, lse)
    yield condensate_ext.last_plan()


@pytest.mark.parametrize("choice", [0, 1, 2])
def test_a_forced_path_is_the_one_that_runs(device, monkeypatch, choice):
    """Stages without sm90 kernels run their sm80 ones when sm90 is forced."""
    path = path_of(device, choice)
    monkeypatch.setenv("CONDENSATE_FORCE_PATH", path)
    case = Case(device, dtype=torch.float16, kv_len=600)
    ran = [plan.stages[-1] for plan in _all_ops(case)]
    stages = ["select_blocks", "select_tokens", "attention", "omitted_mass"]
    assert [stage.stage for stage in ran] == stages
    paths = [path if stage in WITH_SM90 or path != "sm90" else "sm80" for stage in stages]
    assert [stage.path for stage in ran] == paths
    assert {stage.reason for stage in ran} == {"forced by CONDENSATE_FORCE_PATH"}


@pytest.mark.parametrize("choice", [0, 1, 2])
@pytest.mark.parametrize("chunk", range(4))
def test_forced_paths_meet_the_definition(device, seed, monkeypatch, choice, chunk):
    path = path_of(device, choice)
    monkeypatch.setenv("CONDENSATE_FORCE_PATH", path)
    checked = 0
    for case_seed in range(seed + 24 * chunk, seed + 24 * chunk + 24):
        case = from_seed(case_seed, device)
        if checked == 6 or not runs_on(case, path):
            continue
        if path == "sm90" and case.selector == "exact":
            continue
        check_case(case)
        checked += 1
    assert checked > 0 or path == "sm90"


@pytest.mark.parametrize("choice", [0, 1, 2])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_edges_on_every_path(device, seed, monkeypatch, choice, group, head_dim):
    path = path_of(device, choice)
    monkeypatch.setenv("CONDENSATE_FORCE_PATH", path)
    checked = 0
    for index, (query_len, kv_len) in enumerate(EDGES):
        case = Case(
            device, seed + index, torch.float16 if index % 2 else torch.bfloat16, batch=2,
            kv_heads=2, group=group, query_len=query_len, kv_len=kv_len, head_dim=head_dim,
            window=(0, 20, 64, 65)[index % 4], anchors=(3, 0, 64, 67)[index % 4],
            causal=index % 3 > 0, layouts=("transposed", "padded", "contiguous"),
            selector="hostile" if index % 4 == 3 else "lists", topk=3 * 64,
        )  # fmt: skip
        if runs_on(case, path):  # sm90 needs one whole tile of queries
            check_case(case)
            checked += 1
    assert checked >= len(EDGES) - 1


def test_paths_without_force(device):
    half, single = (Case(device, dtype=t) for t in (torch.float16, torch.float32))
    portable, fallback = {"cpu": ("cpu", "cpu"), "cuda": ("sm80", "simt")}[device]
    for plan in _all_ops(half):
        stage = plan.stages[-1]
        hopper = device == "cuda" and has_sm90() and stage.stage in WITH_SM90
        assert stage.path == ("sm90" if hopper else portable)
    odd = Case(device, dtype=torch.float16, layouts=("misaligned",) * 3)
    for case in (single, odd):
        assert all(plan.stages[-1].path == fallback for plan in _all_ops(case))


def test_a_path_that_cannot_run_is_refused(device, monkeypatch):
    monkeypatch.setenv("CONDENSATE_FORCE_PATH", OTHER_DEVICE[device])
    with pytest.raises(
        ValueError, match=r"CONDENSATE_FORCE_PATH is .*, which cannot run this call"
    ):
        next(_all_ops(Case(device)))
    monkeypatch.setenv("CONDENSATE_FORCE_PATH", "fastest")
    with pytest.raises(ValueError, match='CONDENSATE_FORCE_PATH is "fastest", expected cpu_ref'):
        next(_all_ops(Case(device)))
