"""attention_with_kvcache against float64, given its own lists, over every shape of cache."""

from __future__ import annotations

from dataclasses import replace

import condensate_ext as ops
import pytest
import torch

from tests.testkit import oracle
from tests.testkit.decode import (
    LAYOUTS,
    DecodeCase,
    build_decided,
    check_attention,
    expect,
    lists_of,
    run_all,
    shortlists,
    view,
)
from tests.testkit.definition import DTYPES
from tests.testkit.poison import poisoned_outputs

MIXED = (700, 0, 1, 3, 1024, 97, 400)


def check(case: DecodeCase) -> float:
    cache = build_decided(case)
    ops.read_error_word(case.device)
    with poisoned_outputs():
        used = check_attention(cache, run_all(cache))
    assert ops.read_error_word(case.device) == ops.ErrorWord.NONE
    return used


@pytest.mark.parametrize("page_size", [None, 16, 32, 64, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, seed, layout, page_size):
    check(DecodeCase(device, seed, lengths=MIXED, layout=layout, page_size=page_size, query_len=4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 7, 16])
def test_dtypes_and_head_sizes(device, seed, group, head_dim, dtype):
    check(
        DecodeCase(
            device, seed, dtype, lengths=(700, 1023), group=group, head_dim=head_dim, query_len=2
        )
    )


@pytest.mark.parametrize("query_len", [1, 2, 3, 8, 15, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_query_lengths(device, seed, query_len, dtype):
    check(DecodeCase(device, seed, dtype, lengths=MIXED, query_len=query_len, page_size=16))


@pytest.mark.parametrize(
    "window, anchors", [(0, 0), (1, 0), (0, 1), (64, 16), (65, 63), (200, 100)]
)
@pytest.mark.parametrize("page_size", [16, 64])
def test_windows_and_anchors(device, seed, window, anchors, page_size):
    case = DecodeCase(
        device, seed, lengths=(640, 641, 703, 704), window=window, anchors=anchors,
        page_size=page_size,
    )  # fmt: skip
    check(case)
    check(replace(case, far_field=False, dtype=torch.bfloat16))


@pytest.mark.parametrize("topk, shortlist", [(0, 0), (0, 64), (1, 8), (63, 64), (256, 256)])
def test_budgets(device, seed, topk, shortlist):
    check(DecodeCase(device, seed, lengths=(700, 1000), topk=topk, shortlist=shortlist))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_8_bit_caches(device, seed, dtype, head_dim):
    check(
        DecodeCase(
            device, seed, dtype, torch.float8_e4m3fn, lengths=MIXED, head_dim=head_dim, group=4
        )
    )


@pytest.mark.parametrize("options", [
    {"sinks": True}, {"softcap": 5.0}, {"centered": True}, {"top_p": 0.9}, {"top_p": 1.0},
    {"scale": 0.31}, {"scale": -0.05},
    {"sinks": True, "softcap": 30.0, "centered": True, "top_p": 0.7},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options(device, seed, options, dtype):
    check(DecodeCase(device, seed, dtype, lengths=MIXED, query_len=2, **options))


@pytest.mark.parametrize("length", [80 + 256 + 63, 80 + 256 + 64, 80 + 256 + 65])
def test_dense_up_to_the_shortlist(device, seed, length):
    """Candidates that fit the shortlist are all attended, one more and there is a list."""
    case = DecodeCase(device, seed, lengths=(length,), window=64, anchors=16)
    cache = build_decided(case)
    run = run_all(cache)
    check_attention(cache, run)
    dense, _ = expect(cache, mode="dense")
    error = (run["out"].double() - dense.out).abs()
    assert bool((error <= dense.out_bound).all()) == view(cache, 0, 0).dense
    assert bool((run["omitted"] == 0).all()) == view(cache, 0, 0).dense


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("query_len", [1, 8])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_budget_that_covers_the_cache_is_dense(device, seed, dtype, query_len, sinks):
    case = DecodeCase(
        device, seed, dtype, lengths=MIXED, query_len=query_len, topk=1024, shortlist=1024,
        sinks=sinks, group=4, layout="nhd",
    )  # fmt: skip
    cache = case.build()
    reference, _ = expect(cache, mode="dense")
    results = []
    for summaries in (cache.summaries, None):
        out, lse, omitted = ops.attention_with_kvcache(
            *cache.tensors, **{**cache.args, "summaries": summaries}, return_lse=True,
            return_estimate=True,
        )  # fmt: skip
        oracle.assert_matches(reference, out, lse)
        assert (omitted == 0).all()
        results.append(out)
    assert torch.equal(*results)


@pytest.mark.parametrize("variable, value", [
    ("CONDENSATE_FORCE_PATH", "cpu_reference"), ("CONDENSATE_CPU_ISA", "avx512"),
    ("CONDENSATE_CPU_ISA", "avx2"), ("CONDENSATE_CPU_ISA", "baseline"),
])  # fmt: skip
@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("group", [4, 5])
def test_paths_and_instruction_sets_of_the_cpu(
    monkeypatch, seed, variable, value, cache_dtype, group
):
    monkeypatch.setenv(variable, value)
    case = DecodeCase(
        "cpu", seed, torch.bfloat16, cache_dtype, lengths=MIXED, query_len=2, group=group,
        head_dim=96, sinks=True,
    )  # fmt: skip
    try:
        check(case)
        check(replace(case, shortlist=1024, topk=1024))
    except ValueError as error:
        if "on this machine" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [None, 16])
def test_long_and_dense(device, seed, dtype, page_size):
    """More keys than one worker takes, with the heaviest now here, now there."""
    case = DecodeCase(
        device, seed, dtype, lengths=(9000, 5000, 4097), query_len=2, page_size=page_size,
        capacity=9216, topk=9216, shortlist=9216,
    )  # fmt: skip
    cache = case.build()
    for b, where in enumerate((8000, 10, 4090)):
        page = cache.pages(b)[where]
        heavy = cache.query[b, :: case.group, 0] * 3
        cache.key[page, :, where % cache.key.shape[2]] = heavy.to(cache.key.dtype)
    out, lse = ops.attention_with_kvcache(*cache.tensors, **cache.args, return_lse=True)
    oracle.assert_matches(expect(cache, mode="dense")[0], out, lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [None, 16, 64])
def test_given_tokens(device, seed, dtype, page_size):
    case = DecodeCase(
        device, seed, dtype, lengths=MIXED, query_len=3, page_size=page_size, sinks=True
    )
    cache = build_decided(case)
    indices, counts = ops.select_tokens_with_kvcache(*cache.tensors, **cache.select_args)
    with poisoned_outputs():
        out, lse = ops.token_sparse_attention_with_kvcache(
            *cache.tensors, indices, counts, **cache.attend_args
        )
    oracle.assert_matches(expect(cache, lists_of(indices, counts), "given")[0], out, lse)


def test_given_tokens_are_what_selection_attends(device, seed):
    case = DecodeCase(device, seed, lengths=(700, 900), far_field=False)
    cache = case.build()
    run = run_all(cache)
    out, lse = ops.token_sparse_attention_with_kvcache(
        *cache.tensors, run["indices"], run["counts"], **cache.attend_args
    )
    step = 4 * oracle.UNIT_ROUNDOFF[out.dtype]
    torch.testing.assert_close(out, run["out"], rtol=step, atol=step)
    torch.testing.assert_close(lse, run["lse"], rtol=1e-6, atol=1e-6)


def _marked(cache, keys):
    """Weight [B, Hq, Lq, keys] of each key with queries of 0: which were attended?"""
    cache.query.zero_()
    shares = []
    indices, counts = ops.select_tokens_with_kvcache(*cache.tensors, **cache.select_args)
    for chunk in keys.split(cache.case.head_dim):
        cache.value.nan_to_num_(0.0).zero_()
        for b in range(len(cache.lengths)):
            inside = chunk[chunk < cache.length(b)]
            page, slot = cache.pages(b)[inside], inside % cache.key.shape[2]
            at = torch.arange(len(inside), device=inside.device)
            cache.value[page, :, slot, at] = 2.0**14
        out, _ = ops.token_sparse_attention_with_kvcache(
            *cache.tensors, indices, counts, **cache.attend_args
        )
        shares.append(out[..., : len(chunk)].double() / 2**14)
    return torch.cat(shares, -1), lists_of(indices, counts)


@pytest.mark.parametrize("page_size", [None, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_key_of_the_support_weighs_the_same(device, seed, dtype, page_size):
    """With queries of 0 and one-hot values each output element shows one key."""
    case = DecodeCase(
        device, seed, dtype, lengths=(700, 333, 1024), query_len=3, page_size=page_size
    )
    cache = case.build()
    keys = torch.arange(case.capacity, device=device)
    share, found = _marked(cache, keys)
    for b in range(3):
        for i in range(case.query_len):
            v = view(cache, b, i)
            for h in range(case.kv_heads):
                support = v.anyway.clone()
                support[found[b][i][h].long()] = True
                heads = slice(h * case.group, (h + 1) * case.group)
                got = share[b, heads, i, : v.visible]
                assert torch.equal(got != 0, support.expand(case.group, -1))
                assert (share[b, heads, i, v.visible :] == 0).all()
                unit = oracle.UNIT_ROUNDOFF[cache.query.dtype] + 1e-6
                assert ((got * support.sum() - support.double()).abs() <= unit).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_queries_of_zero_the_rest_weighs_as_many_keys_as_it_has(device, seed, dtype):
    case = DecodeCase(device, seed, dtype, lengths=(700, 333, 1024), query_len=3)
    cache = case.build()
    cache.query.zero_()
    run = run_all(cache)
    for b in range(3):
        for i in range(case.query_len):
            v = view(cache, b, i)
            # Scored keys that are no tokens weigh nothing, and are missing all the same.
            dropped = 0 if v.dense else int(shortlists(v)[0].sum()) - case.topk
            weight = torch.tensor(float(v.visible - dropped)).log()
            assert (run["lse"][b, :, i] - weight).abs().max() < 1e-5
            missing = 0 if v.dense else v.visible - int(v.anyway.sum()) - case.topk
            assert (run["omitted"][b, :, i] - missing / v.visible).abs().max() < 1e-5
