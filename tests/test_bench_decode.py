"""The parts of bench.decode that need no GPU: caches, lists, bytes, records and plot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from bench import decode, plot, report
from bench.decode_cases import CASES, DecodeCase
from bench.decode_inputs import Cache, contiguous, make_cache, num_sets, page_lists
from bench.decode_peers import attend_grouped, attend_packed
from tools import readme_table

SMALL = DecodeCase(3, 250, heads=4, kv_heads=2, head_dim=16, page_size=16, dtype="float32")


def test_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_contiguous_keys_are_those_of_the_table() -> None:
    cache = make_cache(SMALL, 1, "cpu")
    key = contiguous(SMALL, cache, cache.key)
    assert key.shape == (3, 2, 250, 16)
    assert sorted(cache.block_table.flatten().tolist()) == list(range(3 * SMALL.max_pages))
    for b, h, j in ((0, 0, 0), (2, 1, 249), (1, 0, 17)):
        page = int(cache.block_table[b, j // 16])
        assert torch.equal(key[b, h, j], cache.key[page, h, j % 16])


def test_keys_of_a_topic_resemble_each_other() -> None:
    """Across pages of 16, so that selection has the same work whatever the page size."""
    cache = make_cache(replace(SMALL, n=256), 2, "cpu")
    key = contiguous(replace(SMALL, n=256), cache, cache.key)[0, 0].unflatten(0, (4, 4, 16))
    means = key.mean(2)  # [topic, page, D]
    within = torch.cosine_similarity(means[:, 0], means[:, 3], dim=-1)
    between = torch.cosine_similarity(means[0], means[1], dim=-1)
    assert within.min() > between.max()


def test_both_ways_of_packing_are_attention() -> None:
    cache = make_cache(SMALL, 3, "cpu")
    key, value = contiguous(SMALL, cache, cache.key), contiguous(SMALL, cache, cache.value)
    expected = scaled_dot_product_attention(
        cache.query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    )
    for attend in (attend_grouped, attend_packed):
        torch.testing.assert_close(attend(cache.query, key, value, SDPBackend.MATH), expected)


def test_peers_are_causal_among_new_queries() -> None:
    case = replace(SMALL, query_len=3)
    cache = make_cache(case, 4, "cpu")
    key, value = contiguous(case, cache, cache.key), contiguous(case, cache, cache.value)
    out = attend_grouped(cache.query, key, value, SDPBackend.MATH)
    for i in range(3):
        seen = case.n - 2 + i
        alone = scaled_dot_product_attention(
            cache.query[:, :, i : i + 1],
            key[:, :, :seen].repeat_interleave(2, 1),
            value[:, :, :seen].repeat_interleave(2, 1),
        )
        torch.testing.assert_close(out[:, :, i : i + 1], alone)
    with pytest.raises(ValueError, match="one query"):
        attend_packed(cache.query, key, value, SDPBackend.MATH)


def test_page_lists_are_ascending_and_the_same_in_both_forms() -> None:
    case = replace(SMALL, n=512, kind="given", topk=64, window=0, anchors=0)
    columns, tokens = page_lists(case, 5, "cpu")
    assert columns.shape == (3, 2, 4) and tokens.shape == (3, 2, 1, 64)
    assert bool((tokens.diff(dim=-1) > 0).all())
    assert torch.equal(tokens[:, :, 0, ::16] // 16, columns.to(torch.int32))


def test_bytes_of_a_step_by_hand() -> None:
    case = DecodeCase(2, 65536, heads=8, kv_heads=2, head_dim=128, page_size=64)
    query_and_out = 2 * 2 * 8 * 128 * 2
    summaries = 4 * (65536 // 8 + 65536 // 64) * (128 + 4)
    gathered = 4 * (4096 + 320 + 320 + 704) * 256  # shortlist and ranges; ranges and tokens
    assert case.selects and case.summary_bytes == summaries
    assert case.step_bytes == query_and_out + summaries + gathered
    assert replace(case, kind="dense").step_bytes == query_and_out + 2 * 4 * 65536 * 256
    short = replace(case, n=4096)
    assert not short.selects and short.step_bytes == query_and_out + 2 * 4 * 4096 * 256


def test_sets_are_more_than_l2_and_fit_the_memory() -> None:
    mib = 1 << 20
    assert num_sets(512 * mib, 20 * mib, 50 * mib) == 8
    assert num_sets(8192 * mib, 20 * mib, 50 * mib) == 3  # 24 GiB
    assert num_sets(40960 * mib, 512 * mib, 50 * mib) == 1


def record(case: DecodeCase, milliseconds: float) -> report.Record:
    ours = {"total": milliseconds, "update": 0.002, "select": 0.008, "attend": 0.006}
    peers = {"sdpa_cudnn_gqa": 0.13, "sdpa_flash_rows": 0.12, "flashinfer_paged": 0.1}
    return decode.make_record(case, ours, peers, ["sdpa_efficient_gqa: no"], 4.25)


def document(*records: report.Record) -> report.Record:
    names = ("gpu", "driver", "torch", "cuda", "commit", "date")
    return {
        "environment": dict.fromkeys(names, "x"),
        "ceilings": {"copy_tb_s": 4.25, "matmul_tflop_s": 790.0},
        "skipped": [],
        "records": list(records),
    }


def test_a_record_relates_a_step_to_the_best_dense_kernel_and_to_a_copy() -> None:
    found = record(DecodeCase(1, 131072, kind="dense"), 0.15)
    assert found["peer"] == "sdpa_flash_rows" and found["speedup"] == 0.8
    assert found["bytes"] == 2 * 8 * 131072 * 256 + 2 * 32 * 256
    assert found["percent_of_copy_bandwidth"] == pytest.approx(
        100 * found["bytes"] / 0.15e-3 / 4.25e12, abs=0.1
    )


def test_records_are_validated_shown_and_drawn(tmp_path: Path) -> None:
    good = document(*(record(case, 0.02) for case in CASES))
    report.save(good, tmp_path / "a.json", "decode")
    report.show_decode(good)
    assert plot.main([str(tmp_path / "a.json")]) == 0
    assert (tmp_path / "a.png").stat().st_size > 1000
    jsonschema = pytest.importorskip("jsonschema")
    with pytest.raises(jsonschema.ValidationError):
        report.validate(document(record(CASES[0], 0.02) | {"batch": 0}), "decode")


def test_cases_are_chosen_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert decode.main(["--dry-run", "--cases", "dense_b1_4K", "b64"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [c.name for c in CASES if "dense_b1_4K" in c.name or "b64" in c.name]
    assert len(names) == 3
    with pytest.raises(SystemExit, match="none of"):
        decode.main(["--dry-run", "--cases", "nothing"])


def test_a_cache_of_a_case_passes_its_table() -> None:
    cache = make_cache(SMALL, 6, "cpu")
    assert isinstance(cache, Cache) and cache.paged()["block_table"] is cache.block_table
    assert cache.lengths.tolist() == [250] * 3


def test_committed_results_match_the_schema() -> None:
    if not report.committed("decode"):
        pytest.skip("no decode.json is committed")
    for path in report.committed("decode"):
        report.validate(json.loads(path.read_text(encoding="utf-8")), "decode")


def test_a_table_has_every_record() -> None:
    made = document(*(record(case, 0.0213) for case in CASES))
    table = readme_table.decode_table(made)
    assert table.count("\n| ") == len(CASES) + 2  # and the header
    assert "| 21.3 |" in table and "| all |" in table
