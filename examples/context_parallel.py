"""Attention over several processes: tensor parallel by KV heads, context parallel by keys.

    torchrun --nproc-per-node 2 examples/context_parallel.py --check

With a GPU for every process tensors live there and NCCL carries them, else gloo does between CPU
processes. docs/scale.md says what equals one process's call, and what does not.

The context is cut into ``n = 2 * world`` chunks, and rank ``r`` keeps chunks ``r`` and
``n - 1 - r``: of a causal prefill an early chunk is seen by many queries and a late one by few, so
that all ranks have the same to do. Tensors of a rank are ``[2, B, H, C, D]``, its chunks of ``C``
tokens in this order.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import condensate_ext
import torch
import torch.distributed as dist
from torch import Tensor

BLOCK_KEYS = 64
SUMMARY_ROWS, MAX_POOLS = 9, 128  # of a block, with selector "block"; of a call's far field
State = tuple[Tensor, Tensor]  # out [B, Hq, L, D], lse [B, Hq, L]


@dataclass(frozen=True)
class Budget:
    """As for ``condensate_ext.attention``. None in its place attends every key."""

    window: int = 256
    anchors: int = 64
    topk: int = 1728
    far_field: bool = True

    @property
    def ranges(self) -> dict[str, Any]:
        return {"window": self.window, "anchors": self.anchors, "far_field": self.far_field}

    @property
    def halo(self) -> int:
        """Keys of the chunk before that the windows of a chunk's first queries reach into."""
        return -(-self.window // BLOCK_KEYS) * BLOCK_KEYS


# ---- Collectives -------------------------------------------------------------------------------


def own_chunks(rank: int, world: int) -> tuple[int, int]:
    return rank, 2 * world - 1 - rank


def shard(whole: Tensor) -> Tensor:
    """This rank's chunks ``[2, B, H, C, D]`` of ``[B, H, L, D]``."""
    world = dist.get_world_size()
    step = 2 * world * BLOCK_KEYS
    if whole.shape[2] % step:
        raise ValueError(
            f"shard: whole has {whole.shape[2]} tokens, expected a multiple of {step} for {world} "
            "processes, so that chunks are whole blocks and tiles; keep the rest as a tail of its "
            "own on one rank."
        )
    chunks = whole.chunk(2 * world, dim=2)
    return torch.stack([chunks[c] for c in own_chunks(dist.get_rank(), world)])


def from_all_ranks(own: Tensor) -> Tensor:
    """``[world, ...]`` from ``[...]`` of every rank."""
    every = own.new_empty((dist.get_world_size(), *own.shape))
    dist.all_gather(list(every.unbind()), own.contiguous())
    return every


def gather(own: Tensor) -> Tensor:
    """``[2 * world, ...]``, all chunks in the order of the context, from ``[2, ...]`` a rank."""
    world = dist.get_world_size()
    by_rank = from_all_ranks(own).flatten(0, 1)
    order = [2 * c if c < world else 2 * (2 * world - 1 - c) + 1 for c in range(2 * world)]
    return by_rank[order]


def to_owners(states: Tensor) -> Tensor:
    """``[world, 2, ...]``, what each rank has for this rank's chunks, from ``[2 * world, ...]``."""
    world = dist.get_world_size()
    send = states[[c for rank in range(world) for c in own_chunks(rank, world)]]
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send)
    return receive.view(world, 2, *states.shape[1:])


def concatenated(chunks: Tensor) -> Tensor:
    """``[B, H, n * C, ...]`` from ``[n, B, H, C, ...]``."""
    return torch.cat(list(chunks), dim=2)


# ---- Tensor parallel ---------------------------------------------------------------------------


def tensor_parallel(attend: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``attend(*tensors)``, each ``[B, H, L, D]``: every rank its heads, outputs concatenated."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if any(tensor.shape[1] % world for tensor in tensors):
        raise ValueError(
            f"tensor_parallel: tensors have {[tensor.shape[1] for tensor in tensors]} heads, "
            f"expected multiples of the {world} processes; use fewer processes."
        )
    out = attend(*(tensor.chunk(world, dim=1)[rank] for tensor in tensors))
    return torch.cat(list(from_all_ranks(out)), dim=1)


# ---- Context parallel --------------------------------------------------------------------------


@dataclass(frozen=True)
class Context:
    """Keys and values of this rank, and what it knows of the others'."""

    key: Tensor  # [2, B, Hkv, C, D]
    value: Tensor
    budget: Budget | None
    summaries: Tensor | None  # [B, Hkv, U, D], of all ranks
    halos: Tensor | None  # [n, 2, B, Hkv, halo, D], last keys and values of every chunk

    @classmethod
    def gather(cls, key: Tensor, value: Tensor, budget: Budget | None) -> Context:
        """Collective: every rank brings its chunks of keys and values."""
        if budget is None:
            return cls(key, value, None, None, None)
        length, halo = key.shape[3], budget.halo
        if budget.anchors + halo > length:
            raise ValueError(
                f"Context.gather: chunks have {length} keys, expected at least {budget.anchors} "
                f"anchors and {halo} of the window; use fewer processes or a longer context."
            )
        summaries = torch.stack([condensate_ext.block_summaries(chunk) for chunk in key])
        ends = torch.stack([key, value], dim=1)[..., length - halo :, :]
        return cls(key, value, budget, concatenated(gather(summaries)), gather(ends))

    def select(self, query: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """Lists of queries that are the last ones of a chunk, of blocks of the whole context."""
        assert self.budget is not None and self.summaries is not None
        seen = (chunk + 1) * self.key.shape[3]
        summaries = self.summaries[:, :, : seen // BLOCK_KEYS * SUMMARY_ROWS].contiguous()
        return condensate_ext.select_blocks(
            query, summaries, kv_len=seen, topk=self.budget.topk, **self.budget.ranges
        )

    def attend(self, query: Tensor, chunk: int, lists: tuple[Tensor, Tensor] | None) -> State:
        """What this rank's keys add to queries that are the last ones of a chunk."""
        states = []
        for key, value, first, causal in self._parts(chunk):
            if self.budget is None or lists is None:
                states.append(attend_all(query, key, value, causal=causal))
                continue
            local = lists_within(*lists, first // BLOCK_KEYS, key.shape[2] // BLOCK_KEYS)
            state = condensate_ext.block_sparse_attention(
                query, key, value, *local,
                window=self.budget.window if causal else 0,
                anchors=self.budget.anchors if first == 0 else 0,
                far_field=self.budget.far_field,
                causal=causal,
            )  # fmt: skip
            states.append(state)
        if states:
            return merge(states)
        return torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf).float()

    def _parts(self, chunk: int) -> Iterator[tuple[Tensor, Tensor, int, bool]]:
        """Keys, values, position of the first key, causality.

        The part with the queries' own chunk begins a halo earlier, so that it holds their windows;
        what the chunk before has for them ends where it begins. So every key is in one part.
        """
        length = self.key.shape[3]
        halo = 0 if self.budget is None else self.budget.halo
        owned = own_chunks(dist.get_rank(), dist.get_world_size())
        for own, key, value in zip(owned, self.key, self.value, strict=True):
            first = own * length
            if own == chunk and own > 0 and self.halos is not None:
                before = self.halos[own - 1]
                key, value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
                yield key, value, first - halo, True
            elif own == chunk:
                yield key, value, first, True
            elif own < chunk:
                end = length - halo if own == chunk - 1 else length
                yield key[:, :, :end], value[:, :, :end], first, False


def attend_all(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> State:
    """Dense attention with its log-sum-exp: all keys are anchors."""
    group = query.shape[1] // key.shape[1]
    positions = min(64, 1 << (128 // group).bit_length() - 1)  # of a tile
    tiles = -(-query.shape[2] // positions)
    counts = torch.zeros(*key.shape[:2], tiles, dtype=torch.int32, device=key.device)
    indices = counts.new_empty((*counts.shape, 0))
    return condensate_ext.block_sparse_attention(
        query, key, value, indices, counts,
        window=0, anchors=key.shape[2], far_field=False, causal=causal,
    )  # fmt: skip


def lists_within(indices: Tensor, counts: Tensor, first: int, blocks: int) -> tuple[Tensor, Tensor]:
    """The entries in blocks ``[first, first + blocks)``, counted from ``first``."""
    places = torch.arange(indices.shape[-1], device=indices.device)
    inside = (indices >= first) & (indices < first + blocks) & (places < counts[..., None])
    local = torch.where(inside, indices - first, blocks).sort(dim=-1).values
    return torch.where(local < blocks, local, -1), inside.sum(-1, dtype=torch.int32)


def merge(states: list[State]) -> State:
    """Results over disjoint keys, joined by their log-sum-exps."""
    return functools.reduce(lambda a, b: condensate_ext.merge_states(*a, *b), states)


def prefill(query: Tensor, context: Context) -> State:
    """Collective: all queries over all keys, causal.

    Takes this rank's queries ``[2, B, Hq, C, D]`` and returns their ``out``, like them, and ``lse``
    ``[2, B, Hq, C]``.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    lists: list[tuple[Tensor, Tensor] | None] = [None] * (2 * world)
    if context.budget is not None:
        own = [context.select(q, c) for q, c in zip(query, own_chunks(rank, world), strict=True)]
        indices, counts = (gather(torch.stack(part)) for part in zip(*own, strict=True))
        lists = list(zip(indices, counts, strict=True))
    queries = gather(query)
    states = [context.attend(q, c, lists[c]) for c, q in enumerate(queries)]
    outs, lses = (to_owners(torch.stack(part)) for part in zip(*states, strict=True))
    merged = [merge([(outs[r, i], lses[r, i]) for r in range(world)]) for i in range(2)]
    return torch.stack([out for out, _ in merged]), torch.stack([lse for _, lse in merged])


def decode(query: Tensor, context: Context) -> State:
    """Collective: one query a sequence, ``[B, Hq, 1, D]`` on every rank, at the last position.

    Returns ``out`` ``[B, Hq, 1, D]`` and ``lse`` ``[B, Hq, 1]``, on every rank.
    """
    if context.budget is None:  # it sees every key: chunks are pages of a cache, in any order
        batch, length = context.key.shape[1], 2 * context.key.shape[3]
        pages = torch.arange(2 * batch, dtype=torch.int32, device=query.device)
        out, lse = condensate_ext.attention_with_kvcache(
            query,
            context.key.flatten(0, 1),
            context.value.flatten(0, 1),
            torch.full((batch,), length, dtype=torch.int32, device=query.device),
            block_table=pages.view(2, batch).t().contiguous(),
            anchors=length,
            return_lse=True,
        )
    else:
        last = 2 * dist.get_world_size() - 1
        out, lse = context.attend(query, last, context.select(query, last))
    return merge(list(zip(from_all_ranks(out), from_all_ranks(lse), strict=True)))



# ---- Compared with one process -----------------------------------------------------------------


def one_process(query: Tensor, key: Tensor, value: Tensor, budget: Budget | None) -> State:
    """The queries of the last positions over all keys ``[B, Hkv, L, D]``."""
    if budget is None:
        return attend_all(query, key, value, causal=True)
    summaries = condensate_ext.block_summaries(key)
    lists = condensate_ext.select_blocks(
        query, summaries, kv_len=key.shape[2], topk=budget.topk, **budget.ranges
    )
    return condensate_ext.block_sparse_attention(query, key, value, *lists, **budget.ranges)


def error(found: State, expected: State, size: Tensor, world: int) -> float:
    """The largest error of out and lse as a share of the bound: at most 1 is equal.

    An output is rounded when a state is made and by each merge, one between a rank's chunks and
    ``world - 1`` between ranks; one process rounds it once; half-precision kernels round
    probabilities, in both. ``size`` is the softmax's mean of ``|value|``. The rest is float32.
    """
    relative = (world + 4) * torch.finfo(expected[0].dtype).eps / 2 + 1e-5
    out = (found[0].float() - expected[0].float()).abs() / (relative * size.float())
    lse = (found[1] - expected[1]).abs() / (1e-5 * expected[1].abs().clamp(min=1))
    return max(out.max().item(), lse.max().item())


def timed(call: Callable[[], State]) -> tuple[State, float]:
    """A result and the seconds until this device has it."""
    start = time.perf_counter()
    result = call()
    if result[0].is_cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def check(name: str, query: Tensor, key: Tensor, value: Tensor, budget: Budget | None) -> bool:
    """Collective: sharded and, on rank 0, whole in turn, best times of three; are they equal?"""
    world, rank = dist.get_world_size(), dist.get_rank()
    context = Context.gather(key, value, budget)
    q, k, v = (concatenated(gather(part)) for part in (query, key, value))
    last = q[:, :, -1:].contiguous()
    calls = (("prefill", q, lambda: prefill(query, context)),
             ("decode", last, lambda: decode(last, context)))  # fmt: skip
    # Pools of a whole call and of its parts are single blocks up to here, finer in parts beyond.
    comparable = budget is None or not budget.far_field or q.shape[2] <= MAX_POOLS * BLOCK_KEYS
    equal = True
    for step, queries, sharded in calls:
        times = []
        for _ in range(3):
            dist.barrier()
            found, seconds = timed(sharded)
            dist.barrier()
            if rank == 0:
                expected, alone = timed(functools.partial(one_process, queries, k, v, budget))
                times.append((seconds, alone))
        if step == "prefill":
            found = concatenated(gather(found[0])), concatenated(gather(found[1]))
        if rank == 0:
            share = error(found, expected, one_process(queries, k, v.abs(), budget)[0], world)
            equal &= share <= 1 or not comparable
            best, alone = (min(column) for column in zip(*times, strict=True))
            print(
                f"{name} {step}: {world} processes {best:.4f} s, one {alone:.4f} s, "
                f"error {share:.2f} of the bound{'' if comparable else ', from finer pools'}"
            )
    return equal


def check_tensor_parallel(query: Tensor, key: Tensor, value: Tensor, budget: Budget) -> bool:
    """Collective: are the outputs of ``attention`` those of one process, bit for bit?"""
    attend = functools.partial(condensate_ext.attention, topk=budget.topk, **budget.ranges)
    whole = [concatenated(gather(part)) for part in (query, key, value)]
    equal = torch.equal(tensor_parallel(attend, *whole), attend(*whole))
    if dist.get_rank() == 0:
        print(f"tensor parallel: {'equal' if equal else 'DIFFERENT'}, bit for bit")
    return equal


# ---- A program of torchrun ---------------------------------------------------------------------


def start() -> torch.device:
    """Joins the processes that torchrun started; this one's device."""
    if torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def noise(heads: int, seed: int, device: torch.device, args: argparse.Namespace) -> Tensor:
    """Chunks ``[2, 1, heads, C, D]`` that do not depend on the rank that makes them."""
    world, made = dist.get_world_size(), []
    for chunk in own_chunks(dist.get_rank(), world):
        generator = torch.Generator(device).manual_seed(10 * chunk + seed)
        size = (1, heads, args.tokens // (2 * world), args.head_dim)
        made.append(torch.randn(size, generator=generator, device=device))
    return torch.stack(made).to(getattr(torch, args.dtype))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sizes = {"tokens": 4096, "heads": 8, "kv-heads": 2, "head-dim": 64, "topk": 512}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--check", action="store_true", help="compare with one process")
    args = parser.parse_args(arguments)
    device = start()
    query = 4 * noise(args.heads, 0, device, args)  # few keys matter, and not as many in each shard
    key, value = (noise(args.kv_heads, seed, device, args) for seed in (1, 2))
    budget, equal = Budget(topk=args.topk), True
    if args.check:
        equal = check_tensor_parallel(query, key, value, budget)
        equal &= check("dense", query, key, value, None)
        equal &= check("no far field", query, key, value, replace(budget, far_field=False))
        equal &= check("far field", query, key, value, budget)
    else:
        for call in ("first", "second"):
            dist.barrier()
            seconds = timed(lambda: prefill(query, Context.gather(key, value, budget)))[1]
            if dist.get_rank() == 0:
                print(f"{call} prefill of {args.tokens} tokens: {seconds:.4f} s")
    dist.destroy_process_group()
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
