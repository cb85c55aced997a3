"""The decoding ops as torch and users see them: opcheck, compile, graphs, arguments."""

from __future__ import annotations

import doctest
from dataclasses import replace

import condensate_ext as ops
import pytest
import torch
from condensate_ext import kvcache
from torch import Tensor

from tests.testkit.decode import Cache, DecodeCase, check_attention, run_all, with_lengths

DECODE_OPS = (
    "attention_with_kvcache", "attention_with_kvcache_", "select_tokens_with_kvcache",
    "token_sparse_attention_with_kvcache", "update_kv_summaries_",
)  # fmt: skip


def small_cache(device: str, **changes: object) -> Cache:
    sizes = {"lengths": (700, 333), "query_len": 2, "page_size": 64, "sinks": True}
    return DecodeCase(device, **{**sizes, **changes}).build()  # type: ignore[arg-type]


def sound_call(name: str, cache: Cache) -> tuple[tuple[Tensor, ...], dict[str, object]]:
    """Positional and keyword arguments of a sound call of the op."""
    s, keywords = cache.summaries, dict(cache.args)
    del keywords["summaries"]
    records = {"summaries": s.rows, "summary_scales": s.scales, "key_center": s.key_center}
    if name == "update_kv_summaries_":
        center = {"key_center": s.key_center, "appended": 70}
        return (s.rows, s.scales, *cache.tensors[1:]), {**cache.update_args, **center}
    if name == "token_sparse_attention_with_kvcache":
        lists = ops.select_tokens_with_kvcache(*cache.tensors, **cache.select_args)
        return (*cache.tensors, *lists), cache.attend_args
    if name == "select_tokens_with_kvcache":
        for drop in ("value_scale", "sinks", "far_field"):
            del keywords[drop]
        return cache.tensors, {**keywords, **records}
    out = (torch.empty_like(cache.query),) if name.endswith("_") else ()
    return (*cache.tensors, *out), {**keywords, **records}


@pytest.mark.parametrize("changes", [
    {}, {"dtype": torch.bfloat16, "page_size": None, "centered": True},
    {"dtype": torch.float16, "top_p": 0.9},  # opcheck itself has no arithmetic for 8-bit caches
])  # fmt: skip
@pytest.mark.parametrize("name", DECODE_OPS)
def test_opcheck(device, name, changes):
    arguments, keywords = sound_call(name, small_cache(device, **changes))
    results = torch.library.opcheck(
        getattr(torch.ops.condensate, name).default, arguments, keywords
    )
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@pytest.mark.parametrize("name", DECODE_OPS)
def test_fake_kernels_keep_shapes_dtypes_and_strides(device, name):
    cache = small_cache(device)
    cache.query = cache.query.transpose(1, 2).contiguous().transpose(1, 2)
    arguments, keywords = sound_call(name, cache)
    real = getattr(torch.ops.condensate, name)(*arguments, **keywords)
    fake_mode = torch._subclasses.FakeTensorMode()
    with fake_mode:
        to_fake = fake_mode.from_tensor
        fakes = tuple(to_fake(t) for t in arguments)
        keywords = {k: to_fake(v) if isinstance(v, Tensor) else v for k, v in keywords.items()}
        fake = getattr(torch.ops.condensate, name)(*fakes, **keywords)
    assert (real is None) == (fake is None)
    for a, b in zip(real or (), fake or (), strict=True):
        facts = [(t.shape, t.dtype, t.device.type, t.stride()) for t in (a, b)]
        assert facts[0] == facts[1] and a.is_contiguous()


def _step(query, key, value, lengths, table, rows, scales, sinks, out):
    """What a decoding step calls, in its order."""
    summaries = ops.KVSummaries(rows, scales)
    summaries.update_(key, value, lengths, appended=2, block_table=table)
    common = {"block_table": table, "window": 64, "anchors": 16}
    selected = {**common, "summaries": summaries, "topk": 64, "shortlist": 256}
    results = ops.attention_with_kvcache(
        query * 2, key, value, lengths, **selected, sinks=sinks, return_lse=True,
        return_estimate=True,
    )  # fmt: skip
    ops.attention_with_kvcache(query, key, value, lengths, **selected, out=out)
    lists = ops.select_tokens_with_kvcache(query, key, value, lengths, **selected)
    given = ops.token_sparse_attention_with_kvcache(query, key, value, lengths, *lists, **common)
    return (*results, *lists, *given, out + 1)


def _step_tensors(cache: Cache) -> list[Tensor]:
    s = cache.summaries
    out = torch.zeros_like(cache.query)
    return [*cache.tensors, cache.table, s.rows, s.scales, cache.sinks, out]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(device, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(_step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ((700, 333), (1024, 40), (900, 800, 700)):
        cache = small_cache(device, lengths=lengths, dtype=torch.float16)
        eager, fast = _step_tensors(cache), [t.clone() for t in _step_tensors(cache)]
        results = zip(_step(*eager), compiled(*fast), strict=True)
        assert all(torch.equal(a, b) for a, b in results)
        for a, b in zip(eager[5:7], fast[5:7], strict=True):
            assert torch.equal(a, b), "the compiled step updates the same summaries"
        assert torch.equal(eager[-1], fast[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("page_size", [16, 64])
def test_cuda_graph_replay_with_longer_lengths_other_pages_and_values(dtype, page_size):
    cache = small_cache("cuda", lengths=(300, 80), dtype=dtype, page_size=page_size)
    tensors = _step_tensors(cache)
    _step(*tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(*tensors)
    for seed, lengths in ((1, (1024, 700)), (2, (5, 900)), (3, (0, 64))):
        other = small_cache("cuda", lengths=lengths, dtype=dtype, page_size=page_size, seed=seed)
        for static, fresh in zip(tensors, _step_tensors(other), strict=True):
            static.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        for replayed, eager in zip(captured, _step(*_step_tensors(other)), strict=True):
            assert torch.equal(replayed, eager)


@pytest.mark.gpu
def test_a_graph_meets_hostile_lengths_and_tables():
    """Captured with sound contents, replayed with others: bounded on the device."""
    cache = small_cache("cuda", lengths=(700, 333), dtype=torch.bfloat16)
    tensors = _step_tensors(cache)
    _step(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(*tensors)
    graph.replay()
    torch.cuda.synchronize()
    sound = [t.clone() for t in captured]
    cache.lengths[0], cache.table[0, 3] = 2**31 - 1, -7
    graph.replay()
    torch.cuda.synchronize()
    word = ops.read_error_word("cuda")
    assert word == ops.ErrorWord.CACHE_LENGTH | ops.ErrorWord.BLOCK_TABLE
    assert all(torch.equal(a[1], b[1]) for a, b in zip(captured, sound, strict=True))


@pytest.mark.parametrize("name", DECODE_OPS[:4])
def test_requires_grad_raises(device, name):
    arguments, keywords = sound_call(name, small_cache(device))
    for index in range(3):
        tracked = arguments[index].detach().clone().requires_grad_()
        changed = (*arguments[:index], tracked, *arguments[index + 1 :])
        with pytest.raises(RuntimeError, match=f"{name} is forward-only, but an input requires"):
            getattr(torch.ops.condensate, name)(*changed, **keywords)
        with torch.no_grad():
            getattr(torch.ops.condensate, name)(*changed, **keywords)
    if "sinks" in keywords:
        tracked = {**keywords, "sinks": keywords["sinks"].clone().requires_grad_()}
        with pytest.raises(RuntimeError, match="forward-only"):
            getattr(torch.ops.condensate, name)(*arguments, **tracked)


def test_autocast_casts_the_query_alone(device):
    cache = small_cache(device, dtype=torch.bfloat16)
    expected = run_all(cache)
    cache.query = cache.query.float()
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = run_all(cache)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_is_written_whatever_its_strides(device, dtype):
    cache = small_cache(device, dtype=dtype)
    expected = ops.attention_with_kvcache(*cache.tensors, **cache.args)
    b, h, n, d = cache.query.shape
    buffer = cache.query.new_full((b, n, h + 1, d + 8), 7.0)
    out = buffer[:, :, :h, :d].transpose(1, 2)
    result, lse = ops.attention_with_kvcache(*cache.tensors, **cache.args, out=out, return_lse=True)
    assert result is out and torch.equal(out, expected) and lse.shape == (b, h, n)
    assert (buffer[:, :, h] == 7.0).all() and (buffer[..., d:] == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_queries(device, dtype):
    cache = small_cache(device, dtype=dtype)
    expected = run_all(cache)
    b, h, n, d = cache.query.shape
    buffer = cache.query.new_full((b, n, h + 1, d + 8), torch.nan)
    query = buffer[:, :, :h, :d].transpose(1, 2)
    query.copy_(cache.query)
    actual = run_all(replace(cache, query=query))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_summaries_by_strides(device):
    """Records that lie apart, as in one buffer with the pages."""
    cache = small_cache(device)
    s = cache.summaries
    pages, heads, rows, dim = s.rows.shape
    apart = torch.zeros(pages, heads + 1, rows, dim, dtype=torch.int8, device=device)[:, :heads]
    scales = torch.zeros(pages, heads + 2, rows, device=device)[:, 1 : heads + 1]
    other = replace(cache, summaries=ops.KVSummaries(apart, scales))
    other.update()
    assert torch.equal(apart, s.rows) and torch.equal(scales, s.scales)
    expected, actual = run_all(cache), run_all(other)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.parametrize("lengths", [(), (5,)])
def test_empty_batches_and_tables(device, lengths):
    cache = small_cache(device, lengths=lengths)
    run = run_all(cache)
    assert run["out"].shape == cache.query.shape
    empty = replace(cache, table=cache.table[:, :0].contiguous())
    out = ops.attention_with_kvcache(*empty.tensors, **empty.args)
    assert (out == 0).all() and out.shape == cache.query.shape
    ops.read_error_word(device)


@pytest.mark.parametrize("change, message", [
    ({"query": lambda c: c.query[0]}, "query has shape"),
    ({"query": lambda c: c.query.int()}, "query has dtype int32, expected float16"),
    ({"query": lambda c: c.query.half()}, "caches"),
    ({"query": lambda c: c.query[..., :32]}, "one head_dim"),
    ({"query": lambda c: c.query[:, :3], "sinks": lambda c: None}, "query has 3 heads"),
    ({"query": lambda c: c.query.expand(2, 4, 2, 64)[:, :, :1].expand(2, 4, 17, 64)},
     "query has 17 positions, expected 1 to 16"),
    ({"key": lambda c: c.key[0]}, "key_cache has shape"),
    ({"key": lambda c: torch.stack([c.key, c.key], -1)[..., 0]}, "key_cache has stride"),
    ({"value": lambda c: c.value[1:]}, "value_cache has shape"),
    ({"value": lambda c: c.value.half()}, "value_cache has dtype"),
    ({"key": lambda c: c.key[:, :, :40], "value": lambda c: c.value[:, :, :40]},
     "summaries has shape|page_size is 40"),
    ({"lengths": lambda c: c.lengths.long()}, "cache_seqlens has dtype int64, expected int32"),
    ({"lengths": lambda c: c.lengths[:1]}, "cache_seqlens has shape"),
    ({"table": lambda c: c.table.long()}, "block_table has dtype int64"),
    ({"table": lambda c: c.table[:, ::2]}, "block_table is not contiguous"),
    ({"table": lambda c: c.table[0]}, "block_table has shape"),
    ({"table": lambda c: None}, "key_cache has .* sequences"),
    ({"sinks": lambda c: c.sinks.half()}, "sinks has dtype"),
    ({"sinks": lambda c: c.sinks[:3]}, "sinks has shape"),
    ({"key_scale": lambda c: torch.ones(3, device=c.key.device)}, "key_scale has shape"),
    ({"value_scale": lambda c: torch.ones(3, device=c.key.device)}, "value_scale has shape"),
])  # fmt: skip
def test_wrong_tensors_are_named(device, change, message):
    cache = small_cache(device)
    wrong = replace(cache, **{name: make(cache) for name, make in change.items()})
    with pytest.raises(ValueError, match=message) as caught:
        ops.attention_with_kvcache(*wrong.tensors, **wrong.args)
    assert "expected" in str(caught.value) and str(caught.value).startswith("attention_with")


@pytest.mark.parametrize("change, message", [
    ({"window": -1}, "window is -1"),
    ({"anchors": 2**31}, "anchors is 2147483648"),
    ({"topk": -1}, "topk is -1"),
    ({"topk": 300}, "shortlist is 256, expected a multiple of 8 that is at least topk .300."),
    ({"shortlist": 250}, "shortlist is 250, expected a multiple of 8"),
    ({"top_p": 0.0}, "top_p is 0"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"scale": float("nan")}, "scale is nan"),
    ({"softcap": float("inf")}, "softcap is inf"),
    ({"softcap": -1.0}, "softcap is -1"),
    ({"summaries": None}, "summaries are not given and window"),
])  # fmt: skip
def test_wrong_numbers_are_named(device, change, message):
    cache = small_cache(device)
    with pytest.raises(ValueError, match=message):
        ops.attention_with_kvcache(*cache.tensors, **{**cache.args, **change})


@pytest.mark.parametrize("change, message", [
    (lambda s: (s.rows.int(), s.scales), "summaries has shape .* expected int8"),
    (lambda s: (s.rows[:, :, 1:], s.scales), "summaries has shape"),
    (lambda s: (s.rows, s.scales.half()), "summary_scales has shape .* expected float32"),
    (lambda s: (s.rows, s.scales[1:]), "summary_scales has shape"),
    (lambda s: (s.rows.transpose(2, 3).contiguous().transpose(2, 3), s.scales), "stride"),
])  # fmt: skip
def test_wrong_summaries_are_named(device, change, message):
    cache = small_cache(device)
    wrong = replace(cache, summaries=ops.KVSummaries(*change(cache.summaries)))
    for run in (run_all, Cache.update):
        with pytest.raises(ValueError, match=message):
            run(wrong)


def test_update_names_wrong_arguments(device):
    cache = small_cache(device)
    with pytest.raises(ValueError, match="appended is -1"):
        cache.update(-1)
    with pytest.raises(ValueError, match="cache_seqlens has shape"):
        replace(cache, lengths=cache.lengths[:, None]).update(1)


@pytest.mark.parametrize("path", ["cpu", "cpu_reference", "sm80", "simt", "sm90", "gpu"])
def test_forced_paths(device, monkeypatch, path):
    cache = small_cache(device)
    monkeypatch.setenv("CONDENSATE_FORCE_PATH", path)
    if path == "gpu" or path.startswith("cpu") != (device == "cpu"):
        for run in (run_all, Cache.update):
            with pytest.raises(ValueError, match="CONDENSATE_FORCE_PATH is"):
                run(cache)
    else:
        cache.update()
        assert "update_kv_summaries" in str(ops.last_plan())
        check_attention(cache, run_all(cache))
        assert device == "cuda" or f"path={path} " in str(ops.last_plan())


def test_out_has_to_fit(device):
    cache = small_cache(device)
    for out, message in (
        (cache.query[:, :, :1].clone(), "out has shape"),
        (cache.query.half(), "out has dtype"),
        (torch.empty(*cache.query.shape, 2, device=device)[..., 0], "out has stride"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.attention_with_kvcache(*cache.tensors, **cache.args, out=out)


def test_what_is_returned(device):
    cache = small_cache(device)
    out, lse, omitted = ops.attention_with_kvcache(
        *cache.tensors, **cache.args, return_lse=True, return_estimate=True
    )
    only = ops.attention_with_kvcache(*cache.tensors, **cache.args)
    assert isinstance(only, Tensor) and torch.equal(only, out)
    assert torch.equal(
        ops.attention_with_kvcache(*cache.tensors, **cache.args, return_lse=True)[1], lse
    )
    assert torch.equal(
        ops.attention_with_kvcache(*cache.tensors, **cache.args, return_estimate=True)[1], omitted
    )


def test_lengths_may_grow_step_by_step(device, seed):
    """A generation: append, update, attend, at every length from before the first list on."""
    case = DecodeCase(device, seed, lengths=(420,), page_size=16, window=32, shortlist=128)
    cache = case.build()
    cache.summaries.rows.zero_()
    cache.summaries.scales.zero_()
    with_lengths(cache, [200]).update(200)
    for length in range(201, 421):
        now = with_lengths(cache, [length])
        now.update(1)
        if length % 20 < 2:
            check_attention(now, run_all(now))


def test_the_example_of_the_module_runs():
    assert doctest.testmod(kvcache).failed == 0
