"""Bad arguments: an error before any launch that names the argument, its value, what is allowed
and the fix. Every message is asserted."""

from __future__ import annotations

import re

import condensate_ext as ops
import pytest
import torch
from condensate_ext import _token_selection

from tests.testkit.cases import Case


def _without_memory(value):
    """The same argument as a meta tensor, in the same strides; other arguments as they are."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _op(name: str):
    return getattr(_token_selection if name == "select_tokens" else ops, name)


def _refusal(name: str, args: tuple, kwargs: dict) -> str:
    """The message that the op and its fake refuse a call with: one, unless it is about devices."""
    with pytest.raises(ValueError) as caught:
        _op(name)(*args, **kwargs)
    message = str(caught.value)
    if " is on " not in message:
        shapes = tuple(map(_without_memory, args))
        options = {key: _without_memory(value) for key, value in kwargs.items()}
        with pytest.raises(ValueError) as of_fake:
            _op(name)(*shapes, **options)
        assert str(of_fake.value) == message
    return message


def _qkv(device: str, **changes: object):
    return Case(device, query_len=9, kv_len=200, **changes).tensors()  # type: ignore[arg-type]


@pytest.fixture
def refused(device):
    """refused(op, args, kwargs, *parts): the call raises ValueError with all of these parts."""

    def check(name: str, args: tuple, kwargs: dict, *parts: str) -> None:
        message = _refusal(name, args, kwargs)
        for part in (name, "expected", *parts):
            assert part in message, f"{part!r} is not in: {message}"

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
        ({"top_p": 0.0}, ("top_p is 0,", "0 < top_p <= 1", "pass None")),
        ({"top_p": -0.5}, ("top_p is -0.5", "0 < top_p <= 1")),
        ({"top_p": 1.5}, ("top_p is 1.5", "0 < top_p <= 1")),
        ({"top_p": float("nan")}, ("top_p is nan", "0 < top_p <= 1")),
        ({"top_p": 0.9, "selector": "exact"}, ("top_p is given", '"exact"', "pass None")),
    ],
)
def test_policy_arguments(device, name, arguments, parts):
    message = _refusal(name, _qkv(device), {"topk": 0, "window": 4, **arguments})
    for part in ("expected", *parts):
        assert part in message, f"{part!r} is not in: {message}"


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_selection_needs_a_positive_scale(device, scale):
    query, key, value = _qkv(device)
    units = ops.block_summaries(key)
    wanted = rf"scale is -?{abs(scale):g}, expected scale > 0.*negate the query instead"
    options = {"topk": 64, "window": 4, "scale": scale}
    assert re.search(wanted, _refusal("select_blocks", (query, units), {**options, "kv_len": 200}))
    for length in (200, 64, 0):  # also where the budget covers the keys, so that none is ranked
        qkv = (query, key[:, :, :length], value[:, :, :length])
        assert re.search(wanted, _refusal("attention", qkv, options))
    ops.attention(query, key, value, selector="exact", topk=5, window=4, scale=scale)


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
    message = _refusal(name, _qkv(device), {"selector": "exact", "far_field": True})
    assert re.search(wanted, message)
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
    yield query, key[:, :0], value[:, :0], ("query has 4 heads and key has 0", "a multiple")
    yield query.to(torch.complex64), key, value, ("query has dtype complex64", "float16, bfloat16")
    yield wide, wide, wide, ("head_dim is 264", "multiple of 8 from 8 to 256", "at most 256")
    yield odd, odd, odd, ("head_dim is 12", "multiple of 8", "pad the last dimension", "to 16")
    if device == "cuda":
        yield query, key.cpu(), value, ("key is on cpu and query on cuda:0", "move one with .to()")


def test_tensor_arguments(device):
    count = 0
    for *tensors, parts in _tensor_faults(device):
        message = _refusal("attention", tuple(tensors), {})
        for part in parts:
            assert part in message, f"{part!r} is not in: {message}"
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
    five = (wide, wide, wide, indices, counts)
    message = _refusal("block_sparse_attention", five, {"far_field": True})
    assert message.startswith("attention: head_dim is 12")


def test_selection_arguments(refused, device):
    query, key, _ = _qkv(device)
    units = ops.block_summaries(key)
    sound = {"kv_len": 200, "topk": 64, "window": 4}
    refused("block_summaries", (key,), {"selector": "exact"}, 'selector is "exact"', "to attention")
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
    bad({"kv_len": None}, "kv_len and key are None", "pass key=key", "kv_len=key.shape[2]")
    bad({"selector": "quest"}, "summaries has shape", "same selector")
    bad({"selector": "exact"}, 'selector is "exact"', "to attention")
    bad({"topk": 65}, "topk is 65", "pass 64 or 128")
    bad({"window": -2}, "window is -2")
    bad({}, "summaries has dtype float16", "expected one dtype", u=units.half())
    bad({}, "summaries has stride", "summaries.contiguous()", u=units.mT.contiguous().mT[..., :])
    bad({"top_p": 0.0}, "top_p is 0,", "0 < top_p <= 1", "pass None")
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


TYPES = [
    ("attention", {"causal": None}, "causal is of type NoneType, expected True or False"),
    ("attention", {"causal": 1}, "causal is 1 of type int, expected True or False"),
    ("attention", {"causal": "no"}, "causal is 'no' of type str"),
    ("attention", {"window": None}, "window is of type NoneType, expected an int"),
    ("attention", {"window": 2.5}, "window is 2.5 of type float, expected an int"),
    ("attention", {"anchors": True}, "anchors is True of type bool, expected an int"),
    (
        "attention",
        {"topk": torch.tensor(64)},
        "topk is of type Tensor, expected an int; call .item",
    ),
    ("attention", {"topk": 2**70}, f"topk is {2**70}, expected an int of 64 bits"),
    ("attention", {"scale": "1"}, "scale is '1' of type str, expected a number or None"),
    ("attention", {"top_p": [0.5]}, "top_p is of type list, expected a number or None"),
    ("attention", {"far_field": "x"}, "far_field is 'x' of type str, expected True, False or None"),
    (
        "attention",
        {"topk_per_head": [64]},
        "topk_per_head is of type list, expected a torch.Tensor",
    ),
    ("attention", {"value": None}, "value is of type NoneType, expected a torch.Tensor; pass one"),
    ("attention_forward", {"key": [1]}, "key is of type list, expected a torch.Tensor"),
    ("select_tokens", {"key": 3}, "key is 3 of type int, expected a torch.Tensor"),
    ("select_tokens", {"causal": None}, "causal is of type NoneType"),
]


@pytest.mark.parametrize("name, changes, wanted", TYPES)
def test_types(refused, device, name, changes, wanted):
    """torch would take None and a bool for something else, and refuse others in its own words."""
    tensors = dict(zip(("query", "key", "value"), _qkv(device), strict=True))
    if name == "select_tokens":
        del tensors["value"]
    refused(name, (), {**tensors, **changes}, wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", [0, 1, 2])
def test_tensors_that_are_not_plain(device, place):
    ragged = [torch.zeros(9, 64, device=device), torch.zeros(5, 64, device=device)]
    for make, wanted in (
        (torch.Tensor.to_sparse, r"is sparse, expected a plain.*\.to_dense\(\)"),
        (lambda t: t[0, 0].to_sparse_csr(), "is sparse"),
        (lambda _: torch.nested.nested_tensor(ragged), "is nested.*pad it"),
        (lambda _: torch.nested.nested_tensor(ragged, layout=torch.jagged), "is nested"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), r"is quantized.*dequantize"),
        (lambda t: t.cpu().to_mkldnn(), "is in a layout of a library.*to_dense"),
    ):
        tensors = list(_qkv(device))
        tensors[place] = make(tensors[place])
        name = ("query", "key", "value")[place]
        with pytest.raises(ValueError, match=f"^attention: {name} {wanted}"):
            ops.attention(*tensors)


def _calls_with_tensors(device: str):
    """Of every op: its name, its tensors in order, and the other arguments."""
    query, key, value = _qkv(device)
    lse = torch.zeros(query.shape[:3], device=device)
    rows = torch.zeros(2, dtype=torch.int64, device=device)
    budgets = torch.full((1,), 64, dtype=torch.int32, device=device)
    units = ops.block_summaries(key)
    lists = ops.select_blocks(query, units, kv_len=200, topk=64)
    policy = {"topk": 64, "topk_per_head": budgets}
    yield "attention", (query, key, value), policy
    yield "attention_forward", (query, key, value), policy
    yield "select_blocks", (query, units, key), {**policy, "kv_len": 200}
    yield "select_tokens", (query, key), {}
    yield "block_sparse_attention", (query, key, value, *lists), {}
    yield "omitted_mass", (query, key, lse), {"rows": rows}
    yield "merge_states", (query, lse, query.clone(), lse.clone()), {}


def test_no_tensor_may_be_a_meta_tensor_beside_others(device):
    """The result would be memory that nobody wrote."""
    tried = 0
    for name, tensors, options in _calls_with_tensors(device):
        for place in range(len(tensors)):
            mixed = [_without_memory(t) if i == place else t for i, t in enumerate(tensors)]
            with pytest.raises(ValueError, match=f"^{name}: .* is on .*, expected one device"):
                _op(name)(*mixed, **options)
            tried += 1
        for key, value in options.items():
            if isinstance(value, torch.Tensor):
                with pytest.raises(ValueError, match=f"^{name}: {key} is on meta and query on "):
                    _op(name)(*tensors, **{**options, key: _without_memory(value)})
                tried += 1
    assert tried >= 24


def test_a_share_below_float32_is_still_a_share(device):
    """1e-46 is 0 in float32, and 0 would mean lists of topk keys."""
    query, key, _ = _qkv(device)
    counts = [
        ops.select_blocks(
            query, ops.block_summaries(key), kv_len=200, topk=64, window=4, anchors=0, top_p=top_p
        )[1]
        for top_p in (1e-46, 1e-30, None)
    ]
    assert torch.equal(counts[0], counts[1]) and not torch.equal(counts[0], counts[2])
