"""merge_states and omitted_mass: what is computed from log-sum-exps."""

from __future__ import annotations

import condensate_ext as ops
import pytest
import torch

from tests.testkit import oracle
from tests.testkit.cases import Case
from tests.testkit.definition import DTYPES, Ranges
from tests.testkit.far_field import SMALLEST_ROUNDING


def _split_attention(case: Case, at: int):
    """(out, lse) of the keys before and from `at`, without causality, and of all keys."""
    query, key, value = case.tensors()
    full = {"window": 0, "causal": False, "anchors": case.kv_len, "far_field": False}
    counts = torch.zeros(
        case.batch, case.kv_heads, -(-case.query_len // 64), dtype=torch.int32, device=case.device
    )
    lists = counts[..., None][..., :0].contiguous(), counts

    def attend(part: slice):
        return ops.block_sparse_attention(query, key[:, :, part], value[:, :, part], *lists, **full)

    return attend(slice(0, at)), attend(slice(at, None)), attend(slice(None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 1, 70, 200])
def test_merging_two_halves_gives_the_whole(device, dtype, at):
    case = Case(device, dtype=dtype, batch=2, kv_heads=2, query_len=90, kv_len=200, head_dim=72)
    first, second, whole = _split_attention(case, at)
    out, lse = ops.merge_states(*first, *second)
    assert out.dtype == dtype and lse.dtype == torch.float32
    bound = 4 * oracle.UNIT_ROUNDOFF[dtype] + 1e-5
    assert (out.float() - whole[0].float()).abs().max() <= bound
    assert (lse - whole[1]).abs().max() <= 1e-5


def _random_state(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int):
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(*shape, 16, generator=generator).to(dtype)
    return out.to(device), (5 * torch.randn(shape, generator=generator)).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_is_the_weighted_mean_and_commutes(device, seed, dtype):
    a = _random_state((2, 3, 130), dtype, device, seed)
    b = _random_state((2, 3, 130), dtype, device, seed + 1)
    out, lse = ops.merge_states(*a, *b)
    both = torch.stack([a[1], b[1]]).double()
    total = both.logsumexp(0)
    weight = (both - total).exp()[..., None]
    expected = weight[0] * a[0].double() + weight[1] * b[0].double()
    size = weight[0] * a[0].double().abs() + weight[1] * b[0].double().abs()
    limit = (oracle.UNIT_ROUNDOFF[dtype] + 64 * oracle.EPS) * size + SMALLEST_ROUNDING[dtype]
    assert ((out.double() - expected).abs() <= limit).all()
    assert ((lse.double() - total).abs() <= 4 * oracle.EPS * (total.abs() + 16)).all()
    swapped = ops.merge_states(*b, *a)
    assert torch.equal(out, swapped[0]) and torch.equal(lse, swapped[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_state_is_neutral(device, dtype):
    state = _random_state((1, 2, 5), dtype, device, 3)
    empty = (torch.zeros_like(state[0]), torch.full_like(state[1], -torch.inf))
    for merged in (ops.merge_states(*state, *empty), ops.merge_states(*empty, *state)):
        assert torch.equal(merged[0], state[0]) and torch.equal(merged[1], state[1])
    out, lse = ops.merge_states(*empty, *empty)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_state_without_weight_takes_no_part(device, dtype, bad):
    """Whatever its output holds: 0 * NaN would be NaN."""
    out, lse = _random_state((1, 2, 5), dtype, device, 3)
    for weightless in (-torch.inf, lse.min() - 200):  # exp(-200) is 0 in float32
        other = (torch.full_like(out, bad), torch.full_like(lse, weightless))
        for merged in (ops.merge_states(out, lse, *other), ops.merge_states(*other, out, lse)):
            assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("query_len, kv_len", [(100, 400), (130, 70), (1, 1), (5, 0)])
def test_omitted_mass_against_the_oracle(device, seed, dtype, causal, query_len, kv_len):
    case = Case(
        device, seed, dtype, batch=2, kv_heads=2, group=3, query_len=query_len, kv_len=kv_len,
        causal=causal,
    )  # fmt: skip
    query, key, value = case.tensors()
    lse = ops.block_sparse_attention(query, key, value, *case.lists(), **case.attention_args)[1]
    visible = Ranges(query_len, kv_len, 0, 0, causal, device).visible()
    expected = oracle.omitted_mass(query, key, lse, visible)
    full = oracle.attention(query, key, value, visible)
    bound = 2 * full.lse_bound.nan_to_num(posinf=0.0)
    omitted = ops.omitted_mass(query, key, lse, causal=causal)
    assert omitted.dtype == torch.float32 and omitted.shape == lse.shape
    assert ((omitted.double() - expected).abs() <= bound).all()
    assert ((omitted >= 0) & (omitted <= 1)).all()
    assert kv_len < 100 or not causal or omitted.max() > 0.05
    rows = torch.tensor([query_len - 1, 0, query_len // 2, 0], device=device)
    assert torch.equal(
        ops.omitted_mass(query, key, lse, rows=rows, causal=causal), omitted[:, :, rows]
    )


def test_omitted_mass_of_everything_is_zero(device):
    case = Case(device, dtype=torch.float16, query_len=90, kv_len=300, topk=320, selector="block")
    query, key, value = case.tensors()
    _, lse, _ = ops.attention_forward(query, key, value, topk=320, **case.attention_args)
    assert ops.omitted_mass(query, key, lse).max() <= 1e-4


def test_rounding_makes_no_estimate_negative(device):
    """Where nearly all mass is attended, the log-sum-exps of attended and of all keys differ by
    rounding, either way."""
    case = Case(device, group=4, query_len=300, kv_len=600, window=8, anchors=4)
    for scale in (0.125, 0.25, 1.0):
        _, _, estimate = ops.attention_forward(
            *case.tensors(), topk=500, selector="exact", window=8, anchors=4, scale=scale
        )
        assert (estimate >= 0).all() and (estimate == 0).any() and (estimate > 0).any()


@pytest.mark.parametrize("selector", ["block", "quest", "mean", "exact"])
def test_estimates_are_shares_and_follow_the_audit(device, selector):
    case = Case(device, dtype=torch.bfloat16, group=4, query_len=200, kv_len=2000, topk=256)
    query, key, value = case.tensors()
    _, lse, estimate = ops.attention_forward(
        query, key, value, topk=256, selector=selector, **case.attention_args
    )
    audited = ops.omitted_mass(query, key, lse)
    assert ((estimate >= 0) & (estimate <= 1 + 1e-6)).all() and (estimate > 0.1).any()
    closeness = 1e-4 if selector == "exact" else 0.25  # of plain noise, estimators see the mean
    assert (estimate - audited).abs().mean() < closeness
