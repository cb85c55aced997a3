"""The Python interface: defaults in one place, parts that give the whole, examples that run."""

from __future__ import annotations

import doctest
import inspect

import condensate_ext as ops
import pytest
import torch
from condensate_ext import _defaults, audit, kvcache, states
from condensate_ext import ops as functions

from tests.testkit.cases import Case

ARGUMENTS = {
    "window": _defaults.WINDOW,
    "anchors": _defaults.ANCHORS,
    "topk": _defaults.TOPK,
    "shortlist": _defaults.SHORTLIST,
}
OPERATORS = (
    "attention", "attention_forward", "block_summaries", "select_blocks", "select_tokens",
    "block_sparse_attention", "omitted_mass", "merge_states", "attention_with_kvcache",
    "select_tokens_with_kvcache", "token_sparse_attention_with_kvcache",
)  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_schemas_have_the_defaults(name):
    for argument in getattr(torch.ops.condensate, name).default._schema.arguments:
        wanted = ARGUMENTS.get(argument.name)
        if argument.name == "topk" and name.endswith("_with_kvcache"):
            wanted = _defaults.CACHE_TOPK
        if wanted is not None:
            assert argument.default_value == wanted, argument


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "select_tokens"])
def test_functions_have_the_schemas_defaults(name):
    parameters = inspect.signature(getattr(ops, name)).parameters
    checked = 0
    for argument in getattr(torch.ops.condensate, name).default._schema.arguments:
        default = argument.default_value
        if argument.name in parameters and argument.name != "selector" and default is not None:
            assert parameters[argument.name].default == default, argument
            checked += 1
    assert checked or name in ("block_summaries", "merge_states")


@pytest.mark.parametrize("query_len", [1, 90])
@pytest.mark.parametrize("selector", ["block", "quest", "mean"])
def test_the_parts_give_the_whole(device, selector, query_len):
    """With the same arguments and no word of the far field."""
    case = Case(device, dtype=torch.float32, group=4, query_len=query_len, kv_len=900)
    query, key, value = case.tensors()
    budget = {"window": 70, "anchors": 5, "topk": 128}
    summaries = ops.block_summaries(key, selector=selector)
    lists = ops.select_blocks(query, summaries, key=key, selector=selector, **budget)
    out, lse = ops.block_sparse_attention(query, key, value, *lists, window=70, anchors=5)
    whole = ops.attention_forward(query, key, value, selector=selector, estimate=False, **budget)
    torch.testing.assert_close((out, lse), whole, atol=2e-5, rtol=2e-5)
    dropped = ops.attention(query, key, value, selector=selector, far_field=False, **budget)
    assert (out - dropped).abs().max() > 1e-3, "the case has no far field to forget"


def test_a_single_query_lists_by_its_keys_as_attention_does(device):
    """Without the keys the list is another: what `key` is for."""
    case = Case(device, dtype=torch.float32, kv_heads=2, query_len=1, kv_len=4096, topk=64)
    query, key, _ = case.tensors()
    summaries, budget = ops.block_summaries(key), {"topk": 64, "window": 64}
    by_keys = ops.select_blocks(query, summaries, key=key, **budget)
    placed = ops.select_blocks(query, summaries, key, kv_len=4096, **budget)
    assert all(map(torch.equal, by_keys, placed))
    by_units = ops.select_blocks(query, summaries, kv_len=4096, **budget)
    assert not torch.equal(by_keys[0], by_units[0])


@pytest.mark.parametrize("selector", ["block", "exact"])
def test_a_log_sum_exp_without_the_estimate(device, selector):
    case = Case(device, dtype=torch.float32, query_len=90, kv_len=900)
    tensors, budget = case.tensors(), {"topk": 64, "window": 64, "selector": selector}
    out, lse, estimate = ops.attention_forward(*tensors, **budget)
    stages = len(ops.last_plan().stages)
    pair = ops.attention_forward(*tensors, estimate=False, **budget)
    if selector == "exact":
        assert len(ops.last_plan().stages) < stages, "the estimate was made after all"
    assert len(pair) == 2 and estimate.shape == lse.shape
    assert torch.equal(pair[0], out) and torch.equal(pair[1], lse)
    assert torch.equal(pair[0], ops.attention(*tensors, **budget))


def _examples():
    """Docstrings of the modules, and of every public function and method in them."""
    for module in (ops, functions, states, kvcache, audit):
        yield module.__name__, module
    for name in ops.__all__:
        value = getattr(ops, name)
        if callable(value):
            yield name, inspect.unwrap(value)


EXAMPLES = dict(_examples())


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name):
    torch.manual_seed(0)
    names = {**vars(ops), "torch": torch}
    finder = doctest.DocTestFinder(recurse=inspect.isclass(EXAMPLES[name]))
    tests = finder.find(EXAMPLES[name], name, module=False, globs=names)
    runner = doctest.DocTestRunner()
    for test in tests:
        assert runner.run(test).failed == 0


@pytest.mark.parametrize("name", [*OPERATORS[:4], *OPERATORS[5:8], "audit_omitted_mass"])
def test_functions_have_an_example(name):
    assert ">>> " in inspect.getdoc(EXAMPLES[name])
