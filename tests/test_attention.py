"""block_sparse_attention and attention_forward at every edge: lengths, tiles, ranges, layouts."""

from __future__ import annotations

import condensate_ext as ce
import pytest
import torch

from tests.testkit.cases import MAX_LENGTH, Case
from tests.testkit.checks import check_case
from tests.testkit.definition import DTYPES
from tests.testkit.poison import LAYOUTS

SELECTORS = ("lists", "block", "exact")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("group", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("delta", [-1, 0, 1])
def test_tile_and_block_edges(device, group, delta, causal):
    for query_len, kv_len in (
        (64 + delta, 128 - delta),
        (128 + delta, 192 + delta),
        (1, 64 + delta),
    ):
        case = Case(
            device, dtype=torch.bfloat16, group=group, query_len=query_len, kv_len=kv_len,
            causal=causal, window=20, anchors=3,
        )  # fmt: skip
        assert check_case(case).probes > 0


def test_everything_is_attended_where_that_is_faster(device):
    """1,024 keys of which an average row sees 512: at most 5/4 of what it would attend."""
    query, key, value = (torch.randn(1, 2, 1024, 64, device=device).half() for _ in range(3))
    sizes = {"window": 64, "anchors": 64}
    dense = ce.attention(query, key, value, topk=1024, **sizes)
    assert torch.equal(ce.attention(query, key, value, topk=320, **sizes), dense)
    assert not torch.equal(ce.attention(query, key, value, topk=256, **sizes), dense)
    exact = ce.attention(query, key, value, topk=320, selector="exact", **sizes)
    assert not torch.equal(exact, dense)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("window", [0, 1, 63, 64, 65, MAX_LENGTH])
@pytest.mark.parametrize("anchors", [0, 1, 63, 64, 65, MAX_LENGTH])
def test_window_and_anchor_edges(device, selector, window, anchors):
    for causal in (True, False):
        check_case(
            Case(
                device, dtype=torch.float16, group=2, query_len=130, kv_len=200, window=window,
                anchors=anchors, causal=causal, selector=selector,
            )
        )  # fmt: skip


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize(
    "query_len, kv_len",
    [(0, 0), (0, 70), (70, 0), (1, 1), (70, 1), (200, 65), (65, 64), (300, 130), (1, 300)],
)
def test_any_lengths(device, selector, query_len, kv_len):
    """Empty tensors, one key, more queries than keys (rows that precede every key)."""
    for causal in (True, False):
        for dtype in DTYPES:
            check_case(
                Case(
                    device, dtype=dtype, kv_heads=2, group=3, query_len=query_len,
                    kv_len=kv_len, selector=selector, causal=causal, batch=2,
                )
            )  # fmt: skip


def test_empty_batch(device):
    assert check_case(Case(device, batch=0)).probes == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(device, head_dim, dtype):
    check_case(Case(device, dtype=dtype, head_dim=head_dim, group=2, query_len=70, kv_len=150))


@pytest.mark.parametrize("group", range(1, 65))
def test_every_group_size(device, group):
    check_case(Case(device, dtype=torch.bfloat16, group=group, query_len=67, kv_len=160))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("selector", SELECTORS)
def test_strided_and_misaligned_inputs(device, selector, layout, dtype):
    case = Case(
        device, dtype=dtype, batch=2, kv_heads=2, group=2, query_len=100, kv_len=260,
        selector=selector, layouts=(layout, layout, layout),
    )  # fmt: skip
    assert check_case(case).probes > 0 or selector == "block"


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-3, 4.0])
def test_any_scale(device, scale):
    for dtype in DTYPES:
        check_case(Case(device, dtype=dtype, scale=scale, query_len=90, kv_len=190))
