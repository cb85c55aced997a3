"""examples/context_parallel.py in two processes that talk by gloo, against one process."""

from __future__ import annotations

import functools
import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import condensate_ext as ops
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.testkit import oracle

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch.distributed has no gloo in this build of torch", allow_module_level=True)

from examples import context_parallel as example

WORLD, BATCH, HEADS, KV_HEADS, TOKENS, HEAD_DIM = 2, 2, 4, 2, 1024, 64
LIMIT = timedelta(seconds=60)
# A window and anchors that end inside blocks; 1,024 keys are few enough for pools of one block.
SPARSE = example.Budget(window=100, anchors=10, topk=128, far_field=False)
BUDGETS = {
    "dense": None,
    "supports": SPARSE,
    "far field": example.Budget(100, 10, 128, far_field=True),
    "no window": example.Budget(window=0, anchors=0, topk=64, far_field=True),
}
DTYPES = (torch.float32, torch.bfloat16)


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def last(self) -> Tensor:
        return self.query[:, :, -1:].contiguous()


@functools.cache
def inputs(seed: int, dtype: torch.dtype) -> Inputs:
    """Large scores: shards weigh differently, so a merge that does not weigh them is wrong."""
    generator = torch.Generator().manual_seed(seed)

    def noise(heads: int) -> Tensor:
        return torch.randn(BATCH, heads, TOKENS, HEAD_DIM, generator=generator).to(dtype)

    return Inputs(4 * noise(HEADS), noise(KV_HEADS), noise(KV_HEADS))


def one_head_each(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return ops.attention(query, key, value, window=100, anchors=10, topk=128)


def one_head_each_cached(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    lengths = torch.full((BATCH,), TOKENS, dtype=torch.int32)
    summaries = ops.KVSummaries.empty_for(key, paged=False)
    summaries.update_(key, value, lengths, appended=TOKENS)
    budget = {"window": 64, "anchors": 16, "topk": 128, "shortlist": 512}
    out = ops.attention_with_kvcache(query, key, value, lengths, summaries=summaries, **budget)
    assert isinstance(out, Tensor)
    return out


def sharded(case: Inputs, budget: example.Budget | None) -> dict[str, tuple[Tensor, ...]]:
    query, key, value = map(example.shard, (case.query, case.key, case.value))
    context = example.Context.gather(key, value, budget)
    found = {
        "prefill": tuple(
            example.concatenated(example.gather(part)) for part in example.prefill(query, context)
        ),
        "decode": example.decode(case.last, context),
    }
    if budget is not None:
        lists = zip(query, example.own_chunks(dist.get_rank(), WORLD), strict=True)
        made = zip(*(context.select(part, chunk) for part, chunk in lists), strict=True)
        found["lists"] = tuple(
            example.concatenated(example.gather(torch.stack(part))) for part in made
        )
    return found


def refusals(case: Inputs) -> list[str]:
    wide = example.Budget(window=250, anchors=10, topk=128)
    calls = (
        lambda: example.shard(case.key[:, :, :1000]),
        lambda: example.Context.gather(*map(example.shard, case[1:]), wide),
        lambda: example.tensor_parallel(one_head_each, *(part[:, :1] for part in case)),
    )
    messages = []
    for call in calls:
        with pytest.raises(ValueError) as raised:
            call()
        messages.append(str(raised.value))
    return messages


def process(rank: int, ports: tuple[int, int], seed: int, folder: Path) -> None:
    torch.set_num_threads(1)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    os.environ.update({name: str(number) for name, number in own.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[0]))
    dist.init_process_group("gloo", timeout=LIMIT)
    found: dict[object, object] = {"refusals": refusals(inputs(seed, torch.float32))}
    for dtype in DTYPES:
        case = inputs(seed, dtype)
        for name, budget in BUDGETS.items():
            found[name, dtype] = sharded(case, budget)
        found["heads", dtype] = example.tensor_parallel(one_head_each, *case)
        found["cached heads", dtype] = example.tensor_parallel(
            one_head_each_cached, case.last, *case[1:]
        )
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(ports[1])
    sizes = {"--tokens": "2048", "--heads": "4", "--topk": "128"}
    found["program"] = example.main(["--check", *(part for size in sizes.items() for part in size)])
    torch.save(found, folder / f"{rank}.pt")


def free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    arguments = (free_ports(), int(os.environ["CONDENSATE_TEST_SEED"]), folder)
    torch.multiprocessing.spawn(process, arguments, nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def assert_equal_within_bound(found, expected, size: Tensor, dtype: torch.dtype) -> None:
    """Four roundings: of a state, of the merges of two chunks and of two ranks, of one process."""
    limit = (4 * oracle.UNIT_ROUNDOFF[dtype] + 1e-5) * size.float() * (1 + 2**-7)
    assert ((found[0].float() - expected[0].float()).abs() <= limit).all()
    assert ((found[1] - expected[1]).abs() <= 1e-5 * expected[1].abs().clamp(min=1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_sharded_keys_give_what_one_process_gives(results, seed, name, step, dtype):
    case, budget = inputs(seed, dtype), BUDGETS[name]
    query = case.query if step == "prefill" else case.last
    expected = example.one_process(query, case.key, case.value, budget)
    size = example.one_process(query, case.key, case.value.abs(), budget)[0]
    for found in results:
        assert_equal_within_bound(found[name, dtype][step], expected, size, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_is_dense(results, seed, dtype):
    """The reference itself, against attention whose budget covers the context."""
    case = inputs(seed, dtype)
    expected = ops.attention_forward(*case, topk=TOKENS, estimate=False)
    size = ops.attention(case.query, case.key, case.value.abs(), topk=TOKENS)
    assert ops.last_plan().selection == "covered"
    assert_equal_within_bound(results[0]["dense", dtype]["prefill"], expected, size, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, budget in BUDGETS.items() if budget])
def test_lists_are_those_of_one_process(results, seed, name, dtype):
    case, budget = inputs(seed, dtype), BUDGETS[name]
    summaries = ops.block_summaries(case.key)
    expected = ops.select_blocks(
        case.query, summaries, kv_len=TOKENS, topk=budget.topk, **budget.ranges
    )
    for found in results:
        assert all(map(torch.equal, found[name, dtype]["lists"], expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_two_processes_are_those_of_one(results, seed, dtype):
    case = inputs(seed, dtype)
    for found in results:
        assert torch.equal(found["heads", dtype], one_head_each(*case))
        cached = one_head_each_cached(case.last, *case[1:])
        assert torch.equal(found["cached heads", dtype], cached)


def test_the_program_checks_itself(results):
    assert [found["program"] for found in results] == [0, 0]


def test_what_does_not_fit_is_refused(results):
    for found in results:
        tokens, window, heads = found["refusals"]
        assert tokens.startswith("shard: whole has 1000 tokens, expected a multiple of 256")
        assert window.startswith("Context.gather: chunks have 256 keys, expected at least 10")
        assert heads.startswith("tensor_parallel: tensors have [1, 1, 1] heads, expected multiples")


def test_lists_within_a_shard():
    indices = torch.tensor([[1, 4, 6, 9, -1], [0, 3, 8, 9, 10], [5, 7, 4, -1, -1]]).int()
    counts = torch.tensor([4, 5, 2]).int()  # the last 4 is past its list's count
    local, inside = example.lists_within(indices, counts, 4, 5)
    assert local.tolist() == [[0, 2, -1, -1, -1], [4, -1, -1, -1, -1], [1, 3, -1, -1, -1]]
    assert inside.tolist() == [2, 1, 2] and local.dtype == inside.dtype == torch.int32
