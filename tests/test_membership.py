"""Who attends what, read off outputs with one-hot values at every edge: no probe may be wrong."""

from __future__ import annotations

import itertools
from functools import partial

import condensate_ext as ops
import pytest
import torch

from tests.testkit import markers
from tests.testkit.cases import Case
from tests.testkit.definition import listed_blocks, support_of_lists, tile_positions

WINDOWS, ANCHORS = (1, 64, 129), (0, 1, 64, 67, 130)


def _attend(query, key, lists, ranges, value):
    return ops.block_sparse_attention(query, key, value, *lists, **ranges)[0]


@pytest.mark.parametrize("path", [None, "portable"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_probes_at_edges(device, seed, monkeypatch, group, causal, path):
    if path:
        forced = {"cpu": "cpu_reference", "cuda": "sm80"}[device]
        monkeypatch.setenv("CONDENSATE_FORCE_PATH", forced)
    dtype = torch.bfloat16 if group == 4 else torch.float16
    probes = wrong = 0
    for window, anchors in itertools.product(WINDOWS, ANCHORS):
        case = Case(
            device, seed, dtype, group=group, query_len=129, kv_len=600, window=window,
            anchors=anchors, topk=5 * 64, causal=causal, head_dim=128,
        )  # fmt: skip
        query, key, value = case.tensors()
        lists = case.lists()
        listed, _ = listed_blocks(*lists, case.kv_len)
        support = support_of_lists(case.ranges, listed, case.query_heads)
        keys = markers.edge_keys(129, 600, window, anchors, tile_positions(group))
        chosen = torch.tensor(keys, device=device)

        silent = torch.zeros_like(query)
        attend = partial(_attend, silent, key, lists, case.attention_args)
        found = markers.attended(attend, value, chosen)
        wrong += int((found != support[..., chosen]).sum())
        probes += found.numel()
        assert found.any() and not found.all()
    assert wrong == 0, f"{wrong} of {probes} probes were wrong"
    assert probes >= 100_000
