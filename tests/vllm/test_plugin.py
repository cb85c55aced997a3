"""The plugin without an engine: settings, refusals, the plan of a batch, a layer's cache."""

from __future__ import annotations

import logging

import pytest
import torch
from condensate_ext import KVSummaries, attention, attention_with_kvcache, vllm
from condensate_ext.vllm.cache import (
    LayerCache,
    Rows,
    carve,
    plan_rows,
    record_bytes_per_token,
    record_rows,
)
from condensate_ext.vllm.settings import Settings
from condensate_ext.vllm.support import Layer, refusal, unsupported

SETTINGS = Settings(window=64, anchors=16, topk=64, shortlist=128, prefill_topk=64)


def test_settings_are_read():
    given = {"WINDOW": "128", "ANCHORS": "0", "TOPK": "8", "SHORTLIST": "16", "TOP_P": "0.9",
             "PREFILL_TOPK": "64", "SKIP_LAYERS": "3, model.layers.5.attn"}  # fmt: skip
    settings = Settings.from_environment({f"CONDENSATE_VLLM_{k}": v for k, v in given.items()})
    skipped = frozenset({"3", "model.layers.5.attn"})
    assert settings == Settings(128, 0, 8, 16, 0.9, 64, skipped)
    assert settings.skips("model.layers.3.attn") and settings.skips("model.layers.5.attn")
    assert not settings.skips("model.layers.13.attn")


@pytest.mark.parametrize(
    ("name", "value"),
    [("WINDOW", "-1"), ("ANCHORS", "x"), ("SHORTLIST", "12"), ("PREFILL_TOPK", "100"),
     ("TOP_P", "0"), ("TOP_P", "nan"), ("TOP_P", "many"), ("TOPK", "5000"), ("BUDGET", "1")],
)  # fmt: skip
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"CONDENSATE_VLLM_{name}.*expected"):
        Settings.from_environment({f"CONDENSATE_VLLM_{name}": value})


def test_the_plugin_is_inert_with_a_reason(monkeypatch, caplog):
    assert "turns it on" in vllm.why_inert({})
    with pytest.raises(ValueError, match="CONDENSATE_VLLM is 'yes'"):
        vllm.why_inert({"CONDENSATE_VLLM": "yes"})
    for found, reason in ((None, "not installed"), ("0.99.1", "0.99.1 is not supported")):
        monkeypatch.setattr(vllm, "vllm_version", lambda found=found: found)
        assert reason in vllm.why_inert({"CONDENSATE_VLLM": "1"})
    monkeypatch.setenv("CONDENSATE_VLLM", "1")
    with caplog.at_level(logging.INFO, logger=vllm.logger.name):
        vllm.logger.addHandler(caplog.handler)
        vllm.register()
        vllm.logger.removeHandler(caplog.handler)
    assert "not supported" in caplog.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"head_dim": 80}, "head_dim 80"), ({"page_size": 96}, "page size of 96"),
     ({"cache_dtype": "fp8"}, "fp8 cache"), ({"attention_type": "encoder_only"}, "encoder_only"),
     ({"alibi": True}, "ALiBi"), ({"softcap": True}, "soft-capped"), ({"sinks": True}, "sinks"),
     ({"group": 65}, "65 query heads"), ({"shares_cache": True}, "another layer's cache")],
)  # fmt: skip
def test_refusals_name_layer_reason_and_option(change, reason):
    sound = dict(name="model.layers.7.attn", head_dim=64, group=3, page_size=128,
                 model_dtype="bfloat16", cache_dtype="auto")  # fmt: skip
    assert unsupported(Layer(**sound)) is None
    layer = Layer(**{**sound, **change})
    message = refusal(layer, unsupported(layer))
    assert reason in message
    assert "CONDENSATE_VLLM_SKIP_LAYERS=model.layers.7.attn" in message


def test_runs_of_a_batch():
    assert plan_rows([1, 1, 4, 4, 17, 17, 0, 1], [9, 20, 8, 7, 17, 40, 0, 3]) == [
        Rows(0, 2, 1, 0, 20), Rows(2, 4, 4, 2, 8), Rows(4, 5, 17, 10, 17), Rows(5, 6, 17, 27, 40),
        Rows(7, 8, 1, 44, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("page_size", [32, 64, 128, 192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_page_has_room_for_its_record(page_size, dtype):
    head_dim, size = 64, dtype.itemsize
    extra = record_bytes_per_token(page_size, head_dim, size)
    cache = torch.zeros(5, 2, page_size, 2 * head_dim + extra // size, dtype=dtype)
    both, summaries = carve(cache, head_dim)
    expected = KVSummaries.empty_for(cache[..., :head_dim], paged=True)
    assert summaries.rows.shape == expected.rows.shape
    assert summaries.scales.shape == expected.scales.shape
    assert record_rows(page_size) == expected.rows.shape[2]
    both.fill_(1), summaries.rows.fill_(2), summaries.scales.fill_(3)
    assert (both == 1).all() and (summaries.rows == 2).all() and (summaries.scales == 3).all()
    assert extra <= 0.1 * size * 2 * head_dim + 2 * size


def filled(dtype=torch.float32, page_size=64):
    """A cache, two sequences that share their first two pages, and all their keys and values."""
    rng = torch.Generator().manual_seed(3)
    head_dim, heads = 64, 2
    extra = record_bytes_per_token(page_size, head_dim, dtype.itemsize) // dtype.itemsize
    cache = torch.zeros(40, heads, page_size, 2 * head_dim + extra, dtype=dtype)
    layer = LayerCache.of(cache, head_dim)
    table = torch.full((3, 12), -1, dtype=torch.int32)
    order = torch.randperm(40, generator=rng)
    table[0, :10], table[1, :2], table[1, 2:9] = order[:10], order[:2], order[10:17]
    table[2, :5] = order[17:22]
    lengths = torch.tensor([601, 540, 300], dtype=torch.int32)
    key, value = torch.randn(2, 3, heads, 768, head_dim, generator=rng).to(dtype)
    key[1, :, :128], value[1, :, :128] = key[0, :, :128], value[0, :, :128]
    return layer, table, lengths, key, value, rng


def write(layer, table, b, key, value, first, last):
    j = torch.arange(first, last)
    size = layer.key.shape[2]
    slots = table[b].long()[j // size] * size + j % size
    padded = torch.cat([slots, torch.tensor([-1, -1])])
    rows = [torch.cat([t[b, :, first:last].transpose(0, 1), torch.full((2, 2, 64), torch.nan)])
            for t in (key, value)]  # fmt: skip
    layer.write(*rows, padded)


@pytest.mark.parametrize("news", [(1, 1, 300), (5, 5, 1), (200, 1, 16)])
def test_a_batch_is_what_the_ops_make_of_each_sequence(news):
    layer, table, lengths, key, value, rng = filled()
    for b in range(len(news)):
        write(layer, table, b, key, value, 0, int(lengths[b]))
    query = torch.randn(sum(news), 6, 64, generator=rng)
    before = lengths - torch.tensor(news, dtype=torch.int32)
    layer.summaries.update_(layer.key, layer.value, before, appended=768, block_table=table)
    out = torch.full_like(query, torch.nan)
    runs = plan_rows(list(news), lengths.tolist())
    layer.attend(query, out, lengths, table, runs, SETTINGS, 0.125)
    token = 0
    for b, new in enumerate(news):
        length, rows = int(lengths[b]), slice(token, token + new)
        keys, values = key[b : b + 1, :, :length], value[b : b + 1, :, :length]
        q = query[rows].transpose(0, 1)[None]
        common = dict(window=64, anchors=16, scale=0.125)
        if new > 16:
            expected = attention(q, keys, values, topk=64, **common)
        else:
            alone = KVSummaries.empty_for(keys, paged=False)
            alone.update_(keys, values, lengths[b : b + 1], appended=length)
            expected = attention_with_kvcache(q, keys, values, lengths[b : b + 1], summaries=alone,
                                              topk=64, shortlist=128, **common)  # fmt: skip
        torch.testing.assert_close(out[rows], expected[0].transpose(0, 1), rtol=0, atol=2e-6)
        token += new


def test_a_reused_page_is_summarised_anew():
    layer, table, lengths, key, value, _ = filled()
    write(layer, table, 0, key, value, 0, 601)
    layer.summaries.update_(layer.key, layer.value, lengths, appended=601, block_table=table)
    table[2, :5] = table[0, 3:8]
    write(layer, table, 2, key, value, 0, 300)
    one = slice(2, 3)
    layer.summaries.update_(
        layer.key, layer.value, lengths[one], appended=300, block_table=table[one]
    )
    fresh = KVSummaries.empty_for(layer.key, paged=True)
    fresh.update_(layer.key, layer.value, lengths[one], appended=300, block_table=table[one])
    pages = table[2, :4].long()
    assert torch.equal(layer.summaries.rows[pages], fresh.rows[pages])
    assert torch.equal(layer.summaries.scales[pages], fresh.scales[pages])
