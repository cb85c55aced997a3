"""The ops as torch sees them: opcheck, compile, CUDA graphs, autograd, autocast, fork, import."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import condensate_ext
import pytest
import torch
from condensate_ext._selectors import SELECTORS
from condensate_ext._token_selection import select_tokens
from torch import Tensor

from tests.test_decode_torch import DECODE_OPS
from tests.testkit.cases import Case
from tests.testkit.definition import DTYPES

ops = torch.ops.condensate
OPS = (
    "attention", "attention_forward", "block_summaries", "select_blocks", "select_tokens",
    "block_sparse_attention", "omitted_mass", "merge_states",
)  # fmt: skip

PUBLIC = [name for name in OPS if name != "select_tokens"]  # whose result no attention takes


def _selection_args(case: Case) -> dict[str, object]:
    return {**case.selection_args, "selector": SELECTORS[case.selector]}


def sound_call(name: str, case: Case) -> tuple[tuple[Tensor, ...], dict[str, object]]:
    """Positional and keyword arguments of a sound call of the op."""
    query, key, value = case.tensors()
    ranges = case.range_args
    lse = torch.zeros(query.shape[:3], device=query.device)
    match name:
        case "attention" | "attention_forward":
            return (query, key, value), {**ranges, **_selection_args(case)}
        case "block_summaries":
            return (key,), {"selector": SELECTORS["quest"]}
        case "select_blocks":
            units = ops.block_summaries(key)
            return (query, units, key), {**ranges, **_selection_args(case), "kv_len": case.kv_len}
        case "select_tokens":
            return (query, key), {**ranges, "topk": case.topk}
        case "block_sparse_attention":
            return (query, key, value, *case.lists()), {**ranges, "far_field": True}
        case "omitted_mass":
            rows = torch.tensor([0, 3], device=query.device)
            return (query, key, lse), {"rows": rows, "causal": case.causal}
    return (query.contiguous(), lse, query.flip(0).contiguous(), lse), {}


def small_case(device: str, **changes: object) -> Case:
    sizes = {
        "batch": 2, "kv_heads": 2, "group": 2, "query_len": 70, "kv_len": 400, "topk": 128,
        "topk_per_head": (64, 128), "top_p": 0.9,
    }  # fmt: skip
    return Case(device, selector="block", **{**sizes, **changes})  # type: ignore[arg-type]


def test_every_op_is_listed_here():
    registered = {
        n.split("::")[1].split(".")[0]
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("condensate::")
    }
    assert registered == {*OPS, *DECODE_OPS}
    assert all(callable(getattr(condensate_ext, name)) for name in PUBLIC)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(device, name, dtype):
    arguments, keywords = sound_call(name, small_case(device, dtype=dtype))
    results = torch.library.opcheck(getattr(ops, name).default, arguments, keywords)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@pytest.mark.parametrize("selector", SELECTORS)
def test_opcheck_selectors(device, selector):
    arguments, _ = sound_call("attention_forward", small_case(device))
    keywords = {"topk": 128, "selector": SELECTORS[selector], "window": 16, "anchors": 4}
    torch.library.opcheck(ops.attention_forward.default, arguments, keywords)


def test_python_functions_are_the_ops(device):
    for name in PUBLIC:
        arguments, keywords = sound_call(name, small_case(device))
        expected = getattr(ops, name)(*arguments, **keywords)
        if "selector" in keywords:  # a name there
            names = {number: selector for selector, number in SELECTORS.items()}
            keywords["selector"] = names[keywords["selector"]]
        actual = getattr(condensate_ext, name)(*arguments, **keywords)
        pairs = (
            zip(expected, actual, strict=True)
            if isinstance(expected, tuple)
            else [(expected, actual)]
        )
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", OPS)
def test_fake_kernels_keep_shapes_dtypes_and_strides(device, name):
    arguments, keywords = sound_call(name, small_case(device, layouts=("transposed",) * 3))
    real = getattr(ops, name)(*arguments, **keywords)
    fake_mode = torch._subclasses.FakeTensorMode()
    with fake_mode:
        to_fake = fake_mode.from_tensor
        fakes = tuple(to_fake(t) for t in arguments)
        keywords = {k: to_fake(v) if isinstance(v, Tensor) else v for k, v in keywords.items()}
        fake = getattr(ops, name)(*fakes, **keywords)
    pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
    for a, b in pairs:
        facts = [(t.shape, t.dtype, t.device.type, t.stride()) for t in (a, b)]
        assert facts[0] == facts[1] and a.is_contiguous()


def _pipeline(query: Tensor, key: Tensor, value: Tensor, topk: int) -> tuple[Tensor, ...]:
    """Every op, one after another."""
    out, lse, estimate = condensate_ext.attention_forward(query * 2, key, value, topk=topk)
    units = condensate_ext.block_summaries(key)
    lists = condensate_ext.select_blocks(query, units, kv_len=key.shape[2], topk=topk)
    last = query[:, :, -1:]
    cut = condensate_ext.select_blocks(last, units, key, kv_len=key.shape[2], topk=topk, top_p=0.5)
    state = condensate_ext.block_sparse_attention(query, key, value, *lists)
    pair = select_tokens(query, key, topk=topk)
    audited = condensate_ext.omitted_mass(query, key, lse)
    merged = condensate_ext.merge_states(out, lse, *state)
    dense = condensate_ext.attention(query, key, value, selector="exact", topk=key.shape[2])
    return (*merged, estimate, audited, *lists, *cut, *pair, dense + 1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(device, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(_pipeline, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for query_len, kv_len in ((70, 600), (100, 450), (129, 700)):  # 1 tile would be a constant
        case = small_case(device, query_len=query_len, kv_len=kv_len, dtype=torch.float16)
        tensors = case.tensors()
        for eager, fast in zip(_pipeline(*tensors, 128), compiled(*tensors, 128), strict=True):
            assert torch.equal(eager, fast)
    assert not dynamic or graphs["unique_graphs"] == before + 1, "one graph serves every length"


@pytest.mark.gpu
def test_compile_with_inductor():
    torch._dynamo.reset()
    tensors = small_case("cuda", dtype=torch.bfloat16).tensors()
    compiled = torch.compile(_pipeline, fullgraph=True)
    for eager, fast in zip(_pipeline(*tensors, 128), compiled(*tensors, 128), strict=True):
        torch.testing.assert_close(eager, fast)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_graph_replay_with_changed_inputs(dtype):
    """Captured once, replayed on other contents: nothing of the first call may be remembered."""
    tensors = small_case("cuda", dtype=dtype).tensors()
    _pipeline(*tensors, 128)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _pipeline(*tensors, 128)
    for seed in (1, 2):
        for static, fresh in zip(
            tensors, small_case("cuda", dtype=dtype, seed=seed).tensors(), strict=True
        ):
            static.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        for replayed, eager in zip(captured, _pipeline(*tensors, 128), strict=True):
            assert torch.equal(replayed, eager)


@pytest.mark.gpu
def test_side_streams():
    tensors = small_case("cuda", dtype=torch.float16, query_len=400, kv_len=4000).tensors()
    expected = _pipeline(*tensors, 128)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # work on another stream would overtake this
        shifted = tuple(t + 0 for t in tensors)
        actual = _pipeline(*shifted, 128)
    side.synchronize()
    assert all(map(torch.equal, expected, actual))


@pytest.mark.parametrize("name", OPS)
def test_requires_grad_raises(device, name):
    arguments, keywords = sound_call(name, small_case(device))
    for index, argument in enumerate(arguments):
        if not argument.is_floating_point():
            continue
        tracked = argument.detach().clone().requires_grad_()
        changed = (*arguments[:index], tracked, *arguments[index + 1 :])
        with pytest.raises(RuntimeError, match=f"{name} is forward-only, but an input requires"):
            getattr(ops, name)(*changed, **keywords)
        with torch.no_grad():
            getattr(ops, name)(*changed, **keywords)


@pytest.mark.parametrize("name", OPS)
def test_forward_mode_raises(device, name):
    """A tangent that the op ignored would be a derivative of 0."""
    arguments, keywords = sound_call(name, small_case(device))
    wanted = f"{name} has no forward-mode derivative, but an input carries a tangent"
    for index, argument in enumerate(arguments):
        if not argument.is_floating_point():
            continue

        def call(tracked: Tensor, index: int = index) -> object:
            changed = (*arguments[:index], tracked, *arguments[index + 1 :])
            return getattr(ops, name)(*changed, **keywords)

        tangent = torch.ones_like(argument)
        with pytest.raises(RuntimeError, match=wanted):
            torch.func.jvp(call, (argument,), (tangent,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(argument, tangent)
            with pytest.raises(RuntimeError, match=wanted):
                call(dual)
            call(argument)  # without a tangent there is nothing to lose
        with torch.no_grad(), pytest.raises(RuntimeError, match=wanted):
            torch.func.jvp(call, (argument,), (tangent,))


def test_jacobians_raise(device):
    small = torch.ones(1, 1, 2, 8, device=device)
    for jacobian in (torch.func.jacfwd, torch.func.jacrev):
        with pytest.raises(RuntimeError, match=r"attention (is forward-only|has no forward-mode)"):
            jacobian(lambda key: ops.attention(small, key, small))(small)


def test_keys_by_name_are_inputs_like_others(device):
    """The keys of select_blocks may be left out, so they may be named."""
    (query, units, key), keywords = sound_call("select_blocks", small_case(device, query_len=1))
    with pytest.raises(RuntimeError, match="select_blocks is forward-only"):
        ops.select_blocks(query, units, key=key.detach().clone().requires_grad_(), **keywords)
    expected = ops.select_blocks(query.half(), units.half(), key.half(), **keywords)
    with torch.autocast(device, dtype=torch.float16):
        assert all(map(torch.equal, ops.select_blocks(query, units, key=key, **keywords), expected))


def test_autocast_casts_to_its_dtype(device):
    query, key, value = small_case(device, dtype=torch.float32).tensors()
    with torch.autocast(device, dtype=torch.bfloat16):
        out, lse, _ = ops.attention_forward(query, key, value, topk=128)
    expected = ops.attention_forward(*(t.bfloat16() for t in (query, key, value)), topk=128)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    with torch.autocast(device, enabled=False):
        assert ops.attention(query, key, value, topk=128).dtype == torch.float32


def _run_in_child(queue: multiprocessing.Queue) -> None:
    out = condensate_ext.attention(*small_case("cpu").tensors(), topk=128)
    queue.put(out.sum().item())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_ops_run_in_a_forked_child():
    """Data loaders fork: the threads of the parent are gone there, the op has to work anyway."""
    torch.set_num_threads(1)  # torch's own OpenMP pool does not outlive a fork
    expected = condensate_ext.attention(*small_case("cpu").tensors(), topk=128).sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_run_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(timeout=60)
    assert child.exitcode == 0


def _python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, text=True,
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_needs_no_gpu_and_starts_no_cuda():
    out = _python(
        "import condensate_ext, torch; q = torch.randn(1, 1, 9, 8);"
        "print(condensate_ext.attention(q, q, q).shape, torch.cuda.is_initialized())",
        CUDA_VISIBLE_DEVICES="",
    )
    assert out.split("\n")[0] == "torch.Size([1, 1, 9, 8]) False"


def test_import_without_the_compiled_ops_says_what_is_missing():
    out = _python(
        "import importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda n, *a: None if n == 'condensate_ext._ops' else find(n, *a);"
        "import condensate_ext, torch; q = torch.randn(1, 1, 9, 8)\n"
        "try: condensate_ext.attention(q, q, q)\n"
        "except ImportError as error: print(error)"
    )
    assert "_ops.abi3.so) are not installed" in out and "pip install" in out and "doctor" in out
