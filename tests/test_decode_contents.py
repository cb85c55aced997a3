"""Hostile tables, lengths and lists; what a batch, a page order or a second run may not change."""

from __future__ import annotations

from dataclasses import replace

import condensate_ext as ops
import pytest
import torch
from condensate_ext import ErrorWord

from tests.testkit import oracle
from tests.testkit.decode import (
    DecodeCase,
    build_decided,
    check_attention,
    expect,
    lists_of,
    run_all,
    view,
    with_lengths,
)

HUGE = 2**31 - 1
BAD_PAGES = (-1, -(2**31), HUGE)
LENGTHS = (700, 1024, 333)


def equal_rows(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], rows: list[int]) -> bool:
    return all(torch.equal(a[name][rows], b[name][rows]) for name in a)


def case_on(device: str, seed: int, **changes: object) -> DecodeCase:
    sizes = {"lengths": LENGTHS, "query_len": 2, "page_size": 16, "sinks": True}
    return DecodeCase(device, seed, **{**sizes, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("page", [*BAD_PAGES, "N"])
@pytest.mark.parametrize("column", [0, 20, 43])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_page_that_is_not_there_is_skipped_and_reported(device, seed, page, column, dtype):
    cache = build_decided(case_on(device, seed, dtype=dtype))
    before = run_all(cache)
    assert ops.read_error_word(device) == ErrorWord.NONE
    cache.table[0, column] = cache.key.shape[0] if page == "N" else page
    after = run_all(cache)
    assert ops.read_error_word(device) == ErrorWord.BLOCK_TABLE
    assert equal_rows(before, after, [1, 2])
    check_attention(cache, after)
    ops.read_error_word(device)
    rows, scales = cache.summaries.rows.clone(), cache.summaries.scales.clone()
    cache.update()
    assert ops.read_error_word(device) == ErrorWord.BLOCK_TABLE
    assert torch.equal(cache.summaries.rows, rows) and torch.equal(cache.summaries.scales, scales)


@pytest.mark.parametrize("page", [*BAD_PAGES, "N"])
@pytest.mark.parametrize("column", [0, 20, 43])
def test_a_page_that_is_not_there_of_a_dense_call(device, seed, page, column):
    cache = case_on(device, seed, topk=1024, shortlist=1024).build()
    before = ops.attention_with_kvcache(*cache.tensors, **cache.args)
    cache.table[0, column] = cache.key.shape[0] if page == "N" else page
    out, lse = ops.attention_with_kvcache(*cache.tensors, **cache.args, return_lse=True)
    assert ops.read_error_word(device) == ErrorWord.BLOCK_TABLE
    assert torch.equal(out[1:], before[1:])
    oracle.assert_matches(expect(cache, mode="dense")[0], out, lse)


def test_a_table_of_garbage(device, seed):
    """No page of a sequence is there: it attends nothing; the sink is all that is left."""
    cache = case_on(device, seed).build()
    before = run_all(cache)
    cache.table[1] = torch.tensor(BAD_PAGES, device=device).repeat(30)[: cache.table.shape[1]]
    after = run_all(cache)
    assert ops.read_error_word(device) == ErrorWord.BLOCK_TABLE
    assert equal_rows(before, after, [0, 2])
    assert (after["out"][1] == 0).all() and (after["counts"][1] == 0).all()
    sinks = cache.sinks[:, None].expand(-1, 2)
    torch.testing.assert_close(after["lse"][1], sinks, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [-1, -(2**31), 1025, HUGE])
@pytest.mark.parametrize("page_size", [None, 16])
def test_a_length_out_of_bounds_is_clamped_and_reported(device, seed, length, page_size):
    cache = build_decided(case_on(device, seed, page_size=page_size))
    before = run_all(cache)
    hostile = with_lengths(cache, [700, length, 333])
    after = run_all(hostile)
    assert ops.read_error_word(device) == ErrorWord.CACHE_LENGTH
    assert equal_rows(before, after, [0, 2])
    clamped = run_all(with_lengths(cache, [700, min(max(length, 0), 1024), 333]))
    assert equal_rows(clamped, after, [1])
    if length < 0:
        assert (after["out"][1] == 0).all() and (after["lse"][1] == -torch.inf).all()
    ops.read_error_word(device)
    rows = cache.summaries.rows.clone()
    hostile.update(3)
    assert ops.read_error_word(device) == ErrorWord.CACHE_LENGTH
    assert torch.equal(cache.summaries.rows, rows)


@pytest.mark.parametrize("tokens, count, expected", [
    ([3, 40, 41, 600], 4, ErrorWord.NONE),
    ([-1, 40, -(2**31), 600], 4, ErrorWord.TOKEN_INDEX),
    ([40, 40, 39, 600], 4, ErrorWord.TOKEN_INDEX),
    ([40, 600, HUGE, HUGE], 4, ErrorWord.TOKEN_INDEX),
    ([40, 41, 699, 700], 4, ErrorWord.TOKEN_INDEX),
    ([40, 41, 600, -1], 3, ErrorWord.NONE),
    ([40, 41, 600, 601], 5, ErrorWord.BLOCK_COUNT),
    ([40, 41, 600, 601], -1, ErrorWord.BLOCK_COUNT),
    ([40, 41, 600, 601], -(2**31), ErrorWord.BLOCK_COUNT),
    ([40, 41, 600, 601], HUGE, ErrorWord.BLOCK_COUNT),
])  # fmt: skip
def test_each_kind_of_bad_token_list(device, seed, monkeypatch, tokens, count, expected):
    cache = case_on(device, seed, query_len=1).build()
    indices = torch.tensor([[40, 41, 100, 200]], dtype=torch.int32, device=device)
    indices = indices.expand(3, 2, 1, 4).contiguous()
    counts = torch.full((3, 2, 1), 4, dtype=torch.int32, device=device)

    def run():
        return ops.token_sparse_attention_with_kvcache(
            *cache.tensors, indices, counts, **cache.attend_args
        )

    before = run()
    indices[0, 1, 0] = torch.tensor(tokens, dtype=torch.int32, device=device)
    counts[0, 1, 0] = count
    out, lse = run()
    assert ops.read_error_word(device) == expected
    valid, last = [], -1
    for token in tokens[: min(max(count, 0), 4)]:
        if last < token < 700:
            valid.append(token)
            last = token
    sound = lists_of(indices.where(indices < 0, indices.clamp(max=699)) * 0 - 1, counts * 0)
    for b in range(3):
        for h in range(2):
            sound[b][0][h] = torch.tensor([40, 41, 100, 200], device=device)
    sound[0][0][1] = torch.tensor(valid, dtype=torch.long, device=device)
    oracle.assert_matches(expect(cache, sound, "given")[0], out, lse)
    assert torch.equal(out[1:], before[0][1:]) and torch.equal(out[0, :2], before[0][0, :2])
    if expected != ErrorWord.NONE:
        monkeypatch.setenv("CONDENSATE_STRICT", "1")
        with pytest.raises(ValueError, match="token_"):
            run()


def test_poison_in_slots_that_no_sequence_has_never_counts(device, seed):
    """Every unused slot and free page is NaN in every case; here also what summaries hold there."""
    cache = build_decided(case_on(device, seed))
    before = run_all(cache)
    used = {int(p) for b in range(3) for p in cache.pages(b).unique()}
    free = [p for p in range(cache.key.shape[0]) if p not in used]
    cache.summaries.scales[free] = torch.nan
    cache.summaries.rows[free] = 127
    for b in range(3):  # units and pools that a sequence has not begun
        page, length = int(cache.pages(b)[-1]), cache.length(b)
        begun = -(-((length - 1) % 16 + 1) // 8)
        cache.summaries.scales[page, :, begun:2] = torch.nan
    assert equal_rows(before, run_all(cache), [0, 1, 2])
    assert all(before[name].isfinite().all() for name in ("out", "lse", "omitted"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [None, 16, 64])
def test_a_sequence_does_not_depend_on_its_batch(device, seed, dtype, page_size):
    case = case_on(
        device, seed, dtype=dtype, page_size=page_size, lengths=(700, 1024, 0, 333, 5, 96, 1023)
    )
    cache = case.build()
    together = run_all(cache)
    assert all(torch.equal(together[name], again) for name, again in run_all(cache).items())
    for b in range(len(case.lengths)):
        one = replace(
            cache,
            query=cache.query[b : b + 1],
            lengths=cache.lengths[b : b + 1],
            table=None if cache.table is None else cache.table[b : b + 1],
        )
        if page_size is None:
            records = cache.summaries
            one = replace(
                one, key=cache.key[b : b + 1], value=cache.value[b : b + 1],
                summaries=ops.KVSummaries(records.rows[b : b + 1], records.scales[b : b + 1]),
            )  # fmt: skip
        for name, alone in run_all(one).items():
            assert torch.equal(alone[0], together[name][b]), name


def test_an_early_query_is_what_it_is_alone(device, seed):
    """A query of a step of several is the single query of a shorter sequence."""
    case = case_on(device, seed, lengths=(700, 1024, 900), query_len=5)
    cache = case.build()
    together = run_all(cache)
    for i in range(5):
        one = replace(
            with_lengths(cache, [n - 4 + i for n in case.lengths]),
            case=replace(case, query_len=1),
            query=cache.query[:, :, i : i + 1],
        )
        alone = run_all(one)
        for name in ("indices", "counts"):
            assert torch.equal(alone[name][:, :, 0], together[name][:, :, i])
        for name in ("out", "lse", "omitted"):
            assert torch.equal(alone[name][:, :, 0], together[name][:, :, i]), name


@pytest.mark.parametrize("page_size", [64, 128])
def test_pages_do_not_show(device, seed, page_size):
    """The order of pages, their size from 64 on and shared prefixes change no bit."""
    case = case_on(device, seed, page_size=None, lengths=(700, 1024, 333), query_len=2)
    flat = case.build()
    paged = replace(case, page_size=page_size).build()
    for b in range(3):
        pages = paged.pages(b)
        slots = torch.arange(len(pages), device=device) % page_size
        paged.key[pages, :, slots] = flat.key[b, :, : len(pages)].transpose(0, 1)
        paged.value[pages, :, slots] = flat.value[b, :, : len(pages)].transpose(0, 1)
    paged = replace(paged, query=flat.query, sinks=flat.sinks)
    paged.update()
    expected = run_all(flat)
    assert equal_rows(expected, run_all(paged), [0, 1, 2])

    paged.table[2] = paged.table[1]  # the third sequence becomes the start of the second
    paged.query[2] = paged.query[1]
    shared = run_all(with_lengths(paged, [700, 1024, 1024]))
    for name, result in shared.items():
        assert torch.equal(result[1], result[2]), name
        assert torch.equal(result[:2], expected[name][:2]), name


def test_rows_before_the_first_key_are_empty(device, seed):
    cache = case_on(device, seed, lengths=(0, 1, 3, 7), query_len=5).build()
    run = run_all(cache)
    assert ops.read_error_word(device) == ErrorWord.NONE
    for b, length in enumerate((0, 1, 3, 7)):
        for i in range(5):
            empty = length - 5 + i < 0
            assert bool((run["lse"][b, :, i] == -torch.inf).all()) == empty
            assert bool((run["out"][b, :, i] == 0).all()) == empty
            assert (run["omitted"][b, :, i] == 0).all() and (run["counts"][b, :, i] == 0).all()


@pytest.mark.parametrize("where", [300, 5, 1020])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_stays_in_its_column(device, seed, where, bad):
    case = case_on(device, seed, lengths=(1024, 1024), query_len=1)
    cache = case.build()
    before = run_all(cache)
    cache.value[cache.pages(0)[where], 1, where % 16, 7] = bad
    cache.update()
    after = run_all(cache)
    reached = ~after["out"].isfinite()
    assert reached[0, case.group :, 0, 7].all()
    reached[0, case.group :, 0, :] = False  # a pool of values is rounded as one row
    assert not reached.any()
    assert torch.equal(after["out"][1], before["out"][1])
    assert torch.equal(after["indices"], before["indices"])
    assert view(cache, 0, 0).visible == 1024
