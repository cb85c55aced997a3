"""Plans: what a call says that it does is what it did, and can be asked for without tensors."""

from __future__ import annotations

import dataclasses

import condensate_ext as ops
import pytest
import torch
from condensate_ext.diagnostics import Plan, plan

from tests.testkit.cases import Case


def _stages(followed: Plan) -> list[str]:
    return [stage.stage for stage in followed.stages]


def _call(device: str, **changes) -> Plan:
    case = Case(device, dtype=torch.float16, query_len=2048, kv_len=2048, head_dim=64)
    arguments = {"window": 256, "anchors": 64, "topk": 64, **changes}
    ops.attention_forward(*case.tensors(), **arguments)
    return ops.last_plan()


def test_every_stage_of_a_call_is_in_its_plan(device):
    blocks = _call(device)
    assert _stages(blocks) == [
        "block_summaries", "select_blocks", "block_summaries", "far_pools", "attention",
    ]  # fmt: skip
    assert (blocks.selection, blocks.list_width, blocks.far_pools) == ("blocks", 1, 32)
    assert _stages(_call(device, far_field=False)) == [
        "block_summaries", "select_blocks", "attention",
    ]  # fmt: skip
    tokens = _call(device, selector="exact")
    assert _stages(tokens) == ["select_tokens", "attention", "omitted_from_lse"]
    assert (tokens.selection, tokens.keys_per_query) == ("tokens", 256 + 64 + 64)


def test_attending_to_everything_is_said(device):
    dense = _call(device, topk=1024)
    assert dense.selection == "dense" and dense.attends_all
    assert _stages(dense) == ["attention"]
    assert (dense.keys_per_query, dense.far_pools, dense.workspace_bytes) == (2048, 0, 0)
    assert _call(device, topk=2048).selection == "covered"
    assert not _call(device).attends_all


def test_ranges_alone_attend_to_no_more_than_they_hold(device):
    case = Case(device, query_len=2048, kv_len=2048)
    query, key, value = case.tensors()
    tiles = ops.select_blocks(
        query,
        ops.block_summaries(key),
        kv_len=2048,
        topk=0,
        window=800,
        anchors=64,
        far_field=False,
    )
    ops.block_sparse_attention(query, key, value, *tiles, window=800, anchors=64, far_field=False)
    ranges = ops.last_plan()
    assert (ranges.selection, ranges.keys_per_query) == ("given", 864)


def test_the_workspace_is_counted(device):
    case = Case(device, dtype=torch.float16, query_len=2048, kv_len=2048, head_dim=64)
    heads = case.batch * case.kv_heads
    summaries, lists = heads * 32 * 9 * 64 * 2, heads * (2048 // 64) * 4
    assert _call(device).workspace_bytes >= summaries + 2 * lists
    assert _call(device, selector="exact").workspace_bytes >= 2 * 4 * 2048 * heads


@pytest.mark.parametrize("selector", ["block", "quest", "mean", "exact"])
def test_it_can_be_asked_for_without_tensors(device, selector):
    case = Case(device, dtype=torch.float16, query_len=2048, kv_len=2048, head_dim=64)
    asked = plan(
        batch=case.batch, query_heads=case.kv_heads * case.group, kv_heads=case.kv_heads,
        query_len=2048, kv_len=2048, head_dim=64, dtype=torch.float16, topk=64, estimate=True,
        selector=selector, device=device,
    )  # fmt: skip
    assert asked == _call(device, selector=selector)


def test_it_is_a_value_and_prints(device):
    followed = _call(device)
    with pytest.raises(dataclasses.FrozenInstanceError):
        followed.selection = "dense"  # type: ignore[misc]
    lines = str(followed).splitlines()
    assert lines[0].startswith("selection=blocks keys_per_query<=")
    assert [line.split(":")[0].strip() for line in lines[1:]] == _stages(followed)
    assert all(f"path={s.path} ({s.reason})" in str(followed) for s in followed.stages)
    assert followed.stage("attention") == followed.stages[-1]


def test_impossible_shapes_are_refused():
    sizes = {"batch": 1, "query_heads": 8, "kv_heads": 3, "query_len": 9, "kv_len": 9}
    with pytest.raises(ValueError, match="query has 8 heads and key has 3"):
        plan(**sizes, head_dim=64)
    with pytest.raises(ValueError, match="topk is 100"):
        plan(**{**sizes, "kv_heads": 2}, head_dim=64, topk=100)
