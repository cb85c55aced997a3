"""The lists of decoding: exact where scores are, in order elsewhere."""

from __future__ import annotations

import condensate_ext as ops
import pytest
import torch

from tests.testkit.decode import (
    DecodeCase,
    build_decided,
    check_lists,
    lists,
    lists_of,
    shortlists,
    view,
)
from tests.testkit.definition import DTYPES

TIED = {"content": "integers", "scale": 2.0**-5}


def select(cache):
    return ops.select_tokens_with_kvcache(*cache.tensors, **cache.select_args)


@pytest.mark.parametrize("topk, shortlist", [(64, 256), (63, 64), (1, 8), (100, 128), (0, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tied_integers_give_the_lists_exactly(device, seed, dtype, topk, shortlist):
    case = DecodeCase(
        device, seed, dtype, lengths=(700, 1024, 500, 90), query_len=2, topk=topk,
        shortlist=shortlist, **TIED,
    )  # fmt: skip
    cache = build_decided(case)
    found = lists_of(*select(cache))
    for b in range(len(case.lengths)):
        for i in range(case.query_len):
            v = view(cache, b, i)
            expected = lists(v, shortlists(v))
            for h in range(case.kv_heads):
                assert torch.equal(found[b][i][h].long(), expected[h])


def test_ties_go_to_the_lower_key_and_unit(device):
    """All keys equal: the shortlist is the first units, the list their first keys."""
    case = DecodeCase(device, lengths=(1000,), anchors=13, window=50, topk=70, shortlist=128)
    cache = case.build()
    for b in range(1):
        cache.key[cache.pages(b), :, torch.arange(1000, device=device) % 64] = 0.5
    cache.update()
    indices, counts = select(cache)
    assert (counts == 70).all()
    assert torch.equal(indices[0, 0, 0], torch.arange(13, 83, dtype=torch.int32, device=device))


@pytest.mark.parametrize("page_size", [None, 16, 128])
@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_order_on_real_keys(device, seed, dtype, group, page_size):
    case = DecodeCase(
        device, seed, dtype, lengths=(700, 1024, 500, 90), query_len=3, group=group,
        page_size=page_size,
    )  # fmt: skip
    cache = build_decided(case)
    check_lists(cache, *select(cache))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("topk", [8, 64, 256])
def test_top_p(device, seed, top_p, topk):
    case = DecodeCase(device, seed, lengths=(700, 1024), query_len=2, topk=topk, top_p=top_p)
    cache = build_decided(case)
    _, counts = select(cache)
    check_lists(cache, *select(cache))
    assert top_p < 1 or topk == 256 or (counts == topk).all()


def test_a_heavy_key_is_found_wherever_it_is(device):
    """One key in the direction of the query; the lists name it, and its unit mates come along."""
    case = DecodeCase(device, lengths=(1024,), group=1, kv_heads=1, topk=8, shortlist=16)
    for where in (16, 23, 24, 500, 895, 896, 959):
        cache = case.build()
        at = cache.pages(0)[where], 0, where % 64
        cache.key[at] = 4 * cache.query[0, 0, 0]
        cache.update()
        indices, _ = select(cache)
        candidate = not bool(view(cache, 0, 0).anyway[where])
        assert bool((indices == where).any()) == candidate


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_keys_that_are_not_finite_do_not_break_lists(device, seed, bad):
    case = DecodeCase(device, seed, lengths=(1024, 1024), query_len=2)
    cache = case.build()
    cache.key[cache.pages(0)[300], :, 300 % 64, 3] = bad
    cache.update()
    lists_of(*select(cache))  # their form


def test_candidates_end_where_the_pool_is_cut(device):
    """Recent keys begin at the window or at the pool that the position cuts."""
    for page_size, pool in ((16, 16), (32, 32), (64, 64), (128, 64)):
        case = DecodeCase(
            device, lengths=(1000,), window=3, anchors=0, topk=2000, shortlist=2000,
            page_size=page_size, capacity=1024,
        )  # fmt: skip
        cache = case.build()
        indices, counts = select(cache)
        recent = min(1000 - 3, 1000 // pool * pool)
        assert (counts == recent).all()
        assert torch.equal(indices[0, 0, 0, :recent].long(), torch.arange(recent, device=device))
