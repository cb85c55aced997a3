"""8-bit summaries of a cache: equal to the definition to the bit, whatever was appended how."""

from __future__ import annotations

import condensate_ext as ops
import pytest
import torch

from tests.testkit.decode import DecodeCase, expected_records, with_lengths
from tests.testkit.definition import DTYPES

PAGES = (None, 16, 32, 64, 128)
LENGTHS = (700, 1024, 0, 1, 7, 8, 9, 63, 64, 65)


def assert_records(cache) -> None:
    rows, scales = expected_records(cache)
    assert torch.equal(cache.summaries.rows, rows)
    assert torch.equal(cache.summaries.scales.nan_to_num(-1.0), scales.nan_to_num(-1.0))


@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_records_are_the_rounded_means(device, seed, dtype, head_dim, page_size):
    case = DecodeCase(
        device, seed, dtype, lengths=LENGTHS, head_dim=head_dim, page_size=page_size,
        layout="nhd" if page_size == 32 else "interleaved",
    )  # fmt: skip
    assert_records(case.build())


@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_centers_and_scales(device, seed, page_size, centered, fp8):
    case = DecodeCase(
        device, seed, torch.bfloat16, torch.float8_e4m3fn if fp8 else None, lengths=LENGTHS,
        page_size=page_size, centered=centered,
    )  # fmt: skip
    assert_records(case.build())


@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize("step", [1, 5, 16, 200])
def test_appending_step_by_step_gives_the_same(device, seed, page_size, step):
    cache = DecodeCase(device, seed, lengths=(431, 77, 300), page_size=page_size).build()
    rows, scales = cache.summaries.rows.clone(), cache.summaries.scales.clone()
    cache.summaries.rows.zero_()
    cache.summaries.scales.zero_()
    for end in [*range(step, 431, step), 431]:
        partial = with_lengths(cache, [min(end, n) for n in (431, 77, 300)])
        partial.update(step)
    assert torch.equal(cache.summaries.rows, rows) and torch.equal(cache.summaries.scales, scales)


@pytest.mark.parametrize("page_size", PAGES)
def test_only_what_the_appended_keys_touch_is_written(device, seed, page_size):
    case = DecodeCase(device, seed, lengths=(431, 77), page_size=page_size)
    cache = case.build()
    for appended, length in ((0, 431), (1, 431), (1, 432), (8, 424), (40, 100), (3, 65)):
        now = with_lengths(cache, [min(length, n) for n in case.lengths])
        rows, scales = now.summaries.rows, now.summaries.scales
        rows.fill_(77)
        scales.fill_(77.0)
        now.update(appended)
        expected, _ = expected_records(now)
        for b in range(2):
            count, pages = now.length(b), now.pages(b)
            for first, size in ((0, 8), (-(-now.key.shape[2] // 8), case.pool)):
                for n in range(-(-count // size)):
                    row = first + n * size % now.key.shape[2] // size
                    at = int(pages[n * size]), slice(None), row
                    touched = min((n + 1) * size, count) > count - appended
                    assert torch.equal(rows[at], expected[at]) == touched
                    assert (scales[at] != 77.0).all() == touched
                    rows[at], scales[at] = 77, 77.0
        assert (rows == 77).all() and (scales == 77.0).all(), "written beside the sequences' units"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_have_scale_nan(device, seed, bad):
    cache = DecodeCase(device, seed, lengths=(200,), page_size=None, capacity=200).build()
    cache.key[0, 0, 37, 5] = bad
    cache.value[0, 1, 70, 63] = bad
    cache.update()
    assert_records(cache)
    nan = cache.summaries.scales[0].isnan()
    assert nan.nonzero().tolist() == [[0, 37 // 8], [1, 25 + 70 // 64]]
    assert (cache.summaries.rows[0, 0, 4] == 0).all()


def test_tiny_and_zero_rows_have_scale_zero(device):
    cache = DecodeCase(device, lengths=(64,), page_size=None, capacity=64).build()
    cache.key[0, :, :8] = 0.0
    cache.key[0, :, 8:16] = 1e-38
    cache.update()
    assert_records(cache)
    assert (cache.summaries.scales[0, :, :2] == 0).all()
    assert (cache.summaries.rows[0, :, :2] == 0).all()


def test_shared_and_copied_pages_take_their_records_along(device, seed):
    """A second sequence that starts with the first one's pages, and a page moved elsewhere."""
    cache = DecodeCase(device, seed, lengths=(512, 512), page_size=64).build()
    cache.table[1, :4] = cache.table[0, :4]
    old, new = int(cache.table[0, 6]), int(cache.table[1, 2 + 1]) * 0 + cache.key.shape[0] - 1
    used = set(cache.table[:, :8].flatten().tolist())
    new = next(p for p in range(cache.key.shape[0]) if p not in used)
    for t in (cache.key, cache.value, cache.summaries.rows, cache.summaries.scales):
        t[new] = t[old].clone()
    cache.table[0, 6] = new
    rows, scales = cache.summaries.rows.clone(), cache.summaries.scales.clone()
    cache.update()
    assert torch.equal(cache.summaries.rows, rows) and torch.equal(cache.summaries.scales, scales)


def test_empty_for_a_cache_has_its_records(device):
    key = torch.zeros(5, 3, 128, 64, device=device, dtype=torch.float16)
    for paged, rows in ((True, 18), (False, 18)):
        summaries = ops.KVSummaries.empty_for(key, paged=paged)
        assert summaries.rows.shape == (5, 3, rows, 64) and summaries.rows.dtype == torch.int8
        assert summaries.scales.shape == (5, 3, rows) and summaries.scales.dtype == torch.float32
        assert summaries.rows.device == summaries.scales.device == key.device
    small = ops.KVSummaries.empty_for(key[:, :, :16], paged=True)
    assert small.rows.shape[2] == 2 + 1
    odd = ops.KVSummaries.empty_for(key[:, :, :100], paged=False)
    assert odd.rows.shape[2] == 13 + 2
    with pytest.raises(ValueError, match="key_cache has shape"):
        ops.KVSummaries.empty_for(key[0], paged=True)
