"""Bad arguments: an error before any launch that names the argument, its value, what is allowed
and the fix. Every message is asserted."""

from __future__ import annotations

import condensate_ext as ops
import pytest
import torch

from tests.testkit.cases import Case


def _qkv(device: str, **changes: object):
    return Case(device, query_len=9, kv_len=200, **changes).tensors()  # type: ignore[arg-type]


@pytest.fixture
def refused(device):
    """refused(op, args, kwargs, *parts): the call raises ValueError with all of these parts."""

    def check(name: str, args: tuple, kwargs: dict, *parts: str) -> None:
        with pytest.raises(ValueError) as caught:
            getattr(ops, name)(*args, **kwargs)
        for part in (name, "expected", *parts):
            assert part in str(caught.value), f"{part!r} is not in: {caught.value}"

    return check


POLICY_OPS = ("attention", "attention_forward")


@pytest.mark.parametrize("name", POLICY_OPS)
@pytest.mark.parametrize(
    "arguments, parts",
    [
        ({"topk": 100}, ("topk is 100", "multiple of 64", "pass 64 or 128", 'selector="exact"')),
        ({"topk": -64}, ("topk is -64", "0 <= topk < 2^31", "pass 0 to select nothing")),
        ({"topk": 2**31}, ("topk is 2147483648", "0 <= topk < 2^31")),
        ({"window": -1}, ("window is -1", "0 <= window < 2^31", "pass 0 for none")),
        ({"window": 2**31}, ("window is 2147483648", "0 <= window < 2^31")),
        ({"anchors": -5}, ("anchors is -5", "0 <= anchors < 2^31", "pass 0 for none")),
        ({"selector": "best"}, ('selector is "best"', '"block", "quest", "mean" or "exact"')),
        ({"scale": float("nan")}, ("scale is nan", "a finite number", "None for 1/sqrt(head_dim)")),
        ({"scale": float("inf")}, ("scale is inf", "a finite number")),
        ({"top_p": 0.0}, ("top_p is 0.0", "0 < top_p <= 1", "pass None")),
        ({"top_p": -0.5}, ("top_p is -0.5", "0 < top_p <= 1")),
        ({"top_p": 1.5}, ("top_p is 1.5", "0 < top_p <= 1")),
        ({"top_p": float("nan")}, ("top_p is nan", "0 < top_p <= 1")),
        ({"top_p": 0.9, "selector": "exact"}, ("top_p is 0.9", '"exact"', "pass None")),
    ],
)
def test_policy_arguments(device, name, arguments, parts):
    with pytest.raises(ValueError) as caught:
        getattr(ops, name)(*_qkv(device), **{"topk": 0, "window": 4, **arguments})
    for part in ("expected", *parts):
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_selection_needs_a_positive_scale(device, scale):
    query, key, value = _qkv(device)
    units = ops.block_summaries(key)
    wanted = rf"scale is -?{abs(scale):g}, expected scale > 0.*negate the query instead"
    with pytest.raises(ValueError, match=wanted):
        ops.select_blocks(query, units, kv_len=200, topk=64, window=4, scale=scale)
    with pytest.raises(ValueError, match=wanted):
        ops.attention(query, key, value, topk=64, window=4, anchors=0, scale=scale)


@pytest.mark.parametrize("name", (*POLICY_OPS, "select_blocks"))
def test_budgets_of_heads(refused, device, name):
    query, key, value = _qkv(device, kv_heads=2)
    tensors = (query, key, value)
    keywords = {"topk": 64, "window": 4}
    if name == "select_blocks":
        tensors, keywords["kv_len"] = (query, ops.block_summaries(key)), 200
    budgets = torch.zeros(4, dtype=torch.int32, device=device)

    def bad(per_head: torch.Tensor, *parts: str, **changes: object) -> None:
        refused(name, tensors, {**keywords, **changes, "topk_per_head": per_head}, *parts)

    bad(budgets[:2].long(), "topk_per_head has dtype int64", "expected int32", ".to()")
    bad(budgets[:2].float(), "topk_per_head has dtype float32", "expected int32")
    bad(budgets[:3], "topk_per_head has shape [3]", "[2]")
    bad(budgets[:2, None], "topk_per_head has shape [2, 1]", "[2]")
    bad(budgets[::2], "topk_per_head is not contiguous", "topk_per_head.contiguous()")
    if device == "cuda":
        bad(budgets[:2].cpu(), "topk_per_head is on cpu and query on cuda:0")
    if name in POLICY_OPS:
        bad(budgets[:2], "topk_per_head is given", '"exact"', "pass None", selector="exact")


@pytest.mark.parametrize("name", POLICY_OPS)
def test_single_keys_have_no_far_field(device, name):
    wanted = r'far_field is True with selector="exact", expected None or False.*pass far_field=None'
    with pytest.raises(ValueError, match=wanted):
        getattr(ops, name)(*_qkv(device), selector="exact", far_field=True)
    for far_field in (None, False):
        getattr(ops, name)(*_qkv(device), selector="exact", far_field=far_field)


def _tensor_faults(device: str):
    """(query, key, value, parts of the message) of every wrong tensor that attention can get."""
    query, key, value = _qkv(device, kv_heads=2, group=2, batch=2)
    half = torch.float16
    wide = torch.zeros(2, 4, 9, 264, device=device)
    odd = torch.zeros(2, 4, 9, 12, device=device)
    turned = torch.zeros(2, 4, 64, 9, device=device).mT
    yield query[0], key, value, ("query has shape [4, 9, 64]", "4 dimensions", "unsqueeze(0)")
    yield turned, key, value, ("query has stride 9", "expected 1", "query.contiguous()")
    yield query, key.mT.contiguous().mT, value, ("key has stride 200", "key.contiguous()")
    yield query.double(), key, value, ("query has dtype float64", "float16, bfloat16 or float32")
    yield query, key.to(half), value, ("key has dtype float16", "float32", "nothing is cast")
    yield query, key, value.to(half), ("value has dtype float16", "expected one dtype", ".to()")
    yield query[:1], key, value, ("key has shape [2, 2, 200, 64]", "[1, 4, 9, 64]", "same batch")
    yield query, key[..., :32], value, ("key has shape [2, 2, 200, 32]", "head_dim")
    yield query, key, value[:, :, :7], ("value has shape [2, 2, 7, 64]", "expected equal shapes")
    yield query[:, :3], key, value, ("query has 3 heads and key has 2", "a multiple", "[batch, ")
    yield query[:, :0], key, value, ("query has 0 heads and key has 2", "expected a multiple")
    many = torch.zeros(2, 130, 9, 64, device=device)
    yield many, key, value, ("query has 130 heads and key has 2", "1 to 64 times")
    yield wide, wide, wide, ("head_dim is 264", "multiple of 8 from 8 to 256", "at most 256")
    yield odd, odd, odd, ("head_dim is 12", "multiple of 8", "pad the last dimension", "to 16")
    if device == "cuda":
        yield query, key.cpu(), value, ("key is on cpu and query on cuda:0", "move one with .to()")


def test_tensor_arguments(device):
    count = 0
    for *tensors, parts in _tensor_faults(device):
        with pytest.raises(ValueError) as caught:
            ops.attention(*tensors)
        for part in parts:
            assert part in str(caught.value), f"{part!r} is not in: {caught.value}"
        count += 1
    assert count >= 14


def test_given_lists(refused, device):
    query, key, value = _qkv(device, kv_heads=2)
    indices = torch.zeros(1, 2, 1, 3, dtype=torch.int32, device=device)
    counts = torch.zeros(1, 2, 1, dtype=torch.int32, device=device)

    def bad(i: torch.Tensor, c: torch.Tensor, *parts: str) -> None:
        refused("block_sparse_attention", (query, key, value, i, c), {}, *parts)

    bad(indices[0], counts, "block_indices has shape [2, 1, 3]", "[batch, kv_heads, tiles, blocks]")
    bad(indices.long(), counts, "block_indices has dtype int64", "expected int32", ".to()")
    bad(indices, counts.long(), "block_counts has dtype int64", "expected int32")
    bad(indices[:, :1], counts, "block_indices has shape [1, 1, 1, 3]", "[1, 2, 1, 3]")
    bad(indices, counts[:, :1], "block_counts has shape [1, 1, 1]", "[1, 2, 1]")
    bad(indices.expand(1, 2, 1, 3)[..., ::2], counts, "block_indices is not contiguous",
        "block_indices.contiguous()")  # fmt: skip
    if device == "cuda":
        bad(indices.cpu(), counts, "block_indices is on cpu and query on cuda:0")
    wide = torch.zeros(1, 2, 9, 12, device=device)
    with pytest.raises(ValueError, match=r"^attention: head_dim is 12"):
        ops.block_sparse_attention(wide, wide, wide, indices, counts, far_field=True)


def test_selection_arguments(refused, device):
    query, key, _ = _qkv(device)
    units = ops.block_summaries(key)
    sound = {"kv_len": 200, "topk": 64, "window": 4}
    refused(
        "block_summaries", (key,), {"selector": "exact"}, 'selector is "exact"', "select_tokens"
    )
    refused("block_summaries", (key,), {"selector": "?"}, 'selector is "?"', '"quest"')
    refused("block_summaries", (key[0],), {}, "key has shape [1, 200, 64]", "4 dimensions")

    def bad(changes: dict, *parts: str, q=query, u=units) -> None:
        refused("select_blocks", (q, u), {**sound, **changes}, *parts)

    bad(
        {"kv_len": 300},
        "summaries has shape [1, 1, 36, 64]",
        "[1, kv_heads, 45, 64]",
        "kv_len 300",
    )
    bad({"kv_len": -1}, "kv_len")
    bad({"selector": "quest"}, "summaries has shape", "same selector")
    bad({"selector": "exact"}, 'selector is "exact"', "select_tokens")
    bad({"topk": 65}, "topk is 65", "pass 64 or 128")
    bad({"window": -2}, "window is -2")
    bad({}, "summaries has dtype float16", "expected one dtype", u=units.half())
    bad({}, "summaries has stride", "summaries.contiguous()", u=units.mT.contiguous().mT[..., :])
    bad({"top_p": 0.0}, "top_p is 0.0", "0 < top_p <= 1", "pass None")
    bad({"key": key[0]}, "key has shape [1, 200, 64]", "4 dimensions")
    bad({"key": key[:, :, :199]}, "key has shape [1, 1, 199, 64]", "kv_len", "were summarised")
    bad({"key": key[..., :32]}, "key has shape [1, 1, 200, 32]", "head_dim")
    bad({"key": key.half()}, "key has dtype float16", "expected one dtype")
    refused("select_tokens", (query, key), {"topk": -1}, "topk is -1", "pass 0 to select nothing")
    refused("select_tokens", (query, key), {"anchors": -1}, "anchors is -1")


def test_state_arguments(refused, device):
    query, key, _ = _qkv(device)
    lse = torch.zeros(1, 1, 9, device=device)
    refused("omitted_mass", (query, key, lse[..., :8]), {}, "lse has shape [1, 1, 8]", "[1, 1, 9]")
    refused("omitted_mass", (query, key, lse.double()), {}, "lse has dtype float64", "float32")
    rows = torch.zeros(2, dtype=torch.int32, device=device)
    refused("omitted_mass", (query, key, lse), {"rows": rows}, "rows has dtype int32", "int64")
    square = rows.long().expand(2, 2).contiguous()
    refused("omitted_mass", (query, key, lse), {"rows": square}, "rows has shape [2, 2]", "[4]")
    out = query.contiguous()
    refused("merge_states", (out, lse, out[:, :, :5], lse), {}, "out_b has shape [1, 1, 5, 64]")
    refused("merge_states", (out, lse, out.half(), lse), {}, "out_b has dtype float16")
    refused("merge_states", (out, lse.half(), out, lse), {}, "lse_a has dtype float16", "float32")
    refused("merge_states", (out, lse, out, lse[..., :5].contiguous()), {}, "lse_b has shape")
    strided = torch.zeros(1, 1, 18, 64, device=device)[:, :, ::2]
    refused("merge_states", (strided, lse, out, lse), {}, "out_a is not contiguous")
    odd = torch.zeros(1, 1, 9, 12, device=device)
    refused("merge_states", (odd, lse, odd, lse), {}, "head_dim is 12", "multiple of 8")
