"""The parts of bench/ that need no GPU: masks for the peers, counts of keys, records and plot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from bench import plot, report
from bench.cases import CASES, Case, few_heads, refinement_scores, scan_scores
from bench.inputs import given_lists, make_inputs, mean_keys_per_query
from bench.peers import flex_mask, pack_tiles, unpack_tiles
from bench.prefill import expected_seconds
from tests.testkit import definition

SMALL = (
    Case(1024, heads=8, kv_heads=2, head_dim=16, window=256, anchors=64, topk=128),
    Case(1024, heads=2, kv_heads=2, head_dim=16, window=100, anchors=3, topk=192),
    Case(512, heads=8, kv_heads=1, head_dim=16, window=64, anchors=0, topk=64),
    Case(512, heads=3, kv_heads=1, head_dim=16, window=70, anchors=130, topk=64),
)
small = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)


def support(case: Case, indices: torch.Tensor) -> torch.Tensor:
    """[Hkv, n, n] by the definition: anchors, window and listed blocks, never the future."""
    p, j = torch.arange(case.n)[:, None], torch.arange(case.n)
    ranges = (j < case.anchors) | (j > p - case.window)
    listed = (indices[0, :, :, :, None] == j // 64).any(2)  # [Hkv, T, n]
    listed = listed.repeat_interleave(case.tile_positions, dim=1)
    return (ranges | listed) & (j <= p)


def flex_support(case: Case, mask: BlockMask) -> torch.Tensor:
    """[Hkv, rows, n] as FlexAttention reads a BlockMask: full blocks whole, the others masked."""
    rows = torch.arange(case.n * case.group)
    zero = torch.tensor(0)
    masked = mask.mask_mod(zero, zero, rows[:, None], torch.arange(case.n))
    assert mask.full_kv_indices is not None and mask.full_kv_num_blocks is not None
    result = []
    for head in range(case.kv_heads):
        partial, full = (
            torch.zeros(indices.shape[2], case.n // 64, dtype=torch.int64)
            .scatter_add_(
                1,
                indices[0, head].long(),
                (torch.arange(indices.shape[3]) < counts[0, head, :, None]).long(),
            )
            .repeat_interleave(case.tile_positions * case.group, 0)
            .repeat_interleave(64, 1)
            for indices, counts in (
                (mask.kv_indices, mask.kv_num_blocks),
                (mask.full_kv_indices, mask.full_kv_num_blocks),
            )
        )
        assert int((partial + full).max()) <= 1, "a block is attended twice"
        result.append((full > 0) | ((partial > 0) & masked))
    return torch.stack(result)


@small
def test_flex_mask_is_the_same_support(case: Case) -> None:
    indices, counts = given_lists(case, 1, "cpu")
    expected = support(case, indices)  # one row a position
    packed = flex_support(case, flex_mask(case, indices, counts))
    rows = pack_tiles(case, expected.repeat_interleave(case.group, 0)[None].to(torch.float32))
    assert torch.equal(packed, rows[0] > 0)


@small
def test_mean_keys_counts_every_key_once(case: Case) -> None:
    indices, counts = given_lists(case, 2, "cpu")
    expected = support(case, indices).sum().item() / (case.kv_heads * case.n)
    assert mean_keys_per_query(case, indices, counts) == pytest.approx(expected, rel=1e-12)


def test_mean_keys_where_lists_overlap_the_ranges() -> None:
    case = SMALL[0]
    indices = torch.arange(2, dtype=torch.int32).expand(1, 2, 32, 2).contiguous()  # anchors too
    counts = torch.full((1, 2, 32), 2, dtype=torch.int32)
    expected = support(case, indices).sum().item() / (case.kv_heads * case.n)
    assert mean_keys_per_query(case, indices, counts) == pytest.approx(expected, rel=1e-12)


def test_flex_mask_refuses_a_list_that_needs_a_mask() -> None:
    case = SMALL[0]
    indices = torch.full((1, 2, 32, 2), 15, dtype=torch.int32)
    with pytest.raises(ValueError, match="not visible to all rows"):
        flex_mask(case, indices, torch.ones(1, 2, 32, dtype=torch.int32))


@small
def test_packing_puts_a_tile_side_by_side(case: Case) -> None:
    query = make_inputs(case, 0, "cpu").query
    packed = pack_tiles(case, query)
    assert torch.equal(unpack_tiles(case, packed), query)
    positions, row = case.tile_positions, case.tile_positions * case.group + 1
    assert torch.equal(packed[0, 0, row], query[0, 0, positions + 1])  # tile 1, head 0, position 1


def test_given_lists_are_ascending_and_padded() -> None:
    case = replace(SMALL[0], n=2048)
    indices, counts = given_lists(case, 3, "cpu")
    for row, count in zip(indices.flatten(0, 2).tolist(), counts.flatten().tolist(), strict=True):
        assert row[:count] == sorted(set(row[:count])) and all(b > 0 for b in row[:count])
        assert row[count:] == [-1] * (len(row) - count)
    assert int(counts.max()) == case.max_blocks


def test_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.topk % 64 == 0 and case.n % case.tile_positions == 0 for case in CASES)


def record(case: Case, milliseconds: float) -> report.Record:
    stage = {"stage": "attention", "ms": 1.0, "tflops": 1.0, "gb_s": 1.0, "percent_of_floor": 50.0}
    return {
        "case": case.name, "n": case.n, "heads": case.heads, "kv_heads": case.kv_heads,
        "head_dim": case.head_dim, "dtype": case.dtype, "budget": case.budget,
        "keys_per_query": 2000.0, "selection": "blocks", "selection_included": True,
        "total_ms": milliseconds, "forward_ms": milliseconds,
        "select_ms": 1.0, "support_ms": milliseconds,
        "attend_ms": 1.0, "far_attend_ms": 1.1,
        "peer": "sdpa_cudnn", "peer_ms": 9.0, "speedup": 9.0,
        "attend_speedup": 9.0, "tflops": 1.0, "percent_of_floor": 1.0, "memory_percent": 1.0,
        "quality_reference": "x", "peers": {"sdpa_cudnn": 9.0}, "peers_failed": [],
        "stages": [stage],
    }  # fmt: skip


def document(*records: report.Record) -> report.Record:
    names = ("gpu", "driver", "torch", "cuda", "commit", "date")
    return {
        "environment": dict.fromkeys(names, "x"),
        "ceilings": {"copy_tb_s": 4.2, "matmul_tflop_s": 790.0},
        "skipped": [],
        "records": list(records),
    }


def test_records_are_validated_shown_and_drawn(tmp_path: Path) -> None:
    good = document(record(CASES[0], 20.0), record(CASES[2], 2.0))
    report.save(good, tmp_path / "a.json")
    report.show(good)
    assert plot.main([str(tmp_path / "a.json")]) == 0
    assert (tmp_path / "a.png").stat().st_size > 1000
    jsonschema = pytest.importorskip("jsonschema")
    with pytest.raises(jsonschema.ValidationError):
        report.validate(document(record(CASES[0], -1.0)))


def test_a_short_case_is_not_skipped_because_a_long_one_took_its_time() -> None:
    measured = [(131072, 20.0), (16384, 8.0), (1048576, 60.0)]
    assert expected_seconds(replace(SMALL[0], n=1024), []) == 0
    assert expected_seconds(replace(SMALL[0], n=1024), measured) == 8
    assert expected_seconds(replace(SMALL[0], n=32768), measured) == 20
    assert expected_seconds(replace(SMALL[0], n=524288), measured) == 60
    assert expected_seconds(replace(SMALL[0], n=2**21), measured) == 60


def test_selection_work_counts_the_scores_of_the_definition() -> None:
    """One far tile by hand: 16 pooled queries scan, and make the list as well."""
    case, last = Case(131072), 65535
    pools = case.group * case.tile_positions // definition.pool_size(case.group)
    assert pools == 16
    assert scan_scores(case, last) == pools * (last + 1) / 64 * (8 + 1)
    assert refinement_scores(case, last) == 0
    assert scan_scores(case, last=2047) == 0, "27 blocks are the list"


def test_tiles_that_share_a_scan_refine_their_shortlists() -> None:
    case, last = Case(524288), 262143
    walked = 64 + (case.window + case.anchors) / 64
    assert scan_scores(case, last) == 16 * (last + 1) / 64 * (8 + 1)
    assert refinement_scores(case, last) == 16 * walked * 8
    assert scan_scores(case, last=4095) == 0, "all blocks are on the shortlist"
    assert refinement_scores(case, last=4095) > 0


def test_tiles_share_a_scan_as_in_the_definition() -> None:
    for n in (131072, 262144, 524288, 1048576):
        assert few_heads(n).scan_tiles == definition.scan_tiles(n)


def test_committed_results_match_the_schema() -> None:
    if not report.committed("prefill"):
        pytest.skip("no prefill.json is committed")
    for path in report.committed("prefill"):
        report.validate(json.loads(path.read_text(encoding="utf-8")))
