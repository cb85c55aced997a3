"""Attention over more than one process: `torchrun --nproc-per-node 2 examples/context_parallel.py`.

Context parallel: each process holds a stretch of the keys and values and attends it, and the
results are merged by their log-sum-exps. Tensor parallel: each process holds some KV heads with
their query heads. Both are compared with one process that holds everything. Runs on the CPU with
gloo, on GPUs with NCCL.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from condensate_ext import attention_forward, merge_states
from torch import Tensor

BUDGET = dict(window=64, anchors=16, topk=256)


def context_parallel(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Dense attention of the last queries over keys that are split over the processes in order.

    Args:
        query: ``[B, Hq, Lq, D]``, the same in every process; at most as many as the last
            process has keys.
        key: ``[B, Hkv, Lk / processes, D]``, this process's stretch.
        value: like ``key``.

    Returns:
        ``out`` like ``query`` and ``lse`` ``[B, Hq, Lq]``, the same in every process.
    """
    last = dist.get_rank() == dist.get_world_size() - 1
    everything = -(-key.shape[2] // 64) * 64
    # Only the last stretch has keys that come after a query.
    out, lse = attention_forward(query, key, value, topk=everything, causal=last, estimate=False)
    outs, lses = ([torch.empty_like(t) for _ in range(dist.get_world_size())] for t in (out, lse))
    dist.all_gather(outs, out)
    dist.all_gather(lses, lse)
    out, lse = outs[0], lses[0]
    for other, other_lse in zip(outs[1:], lses[1:], strict=True):
        out, lse = merge_states(out, lse, other, other_lse)
    return out, lse


def tensor_parallel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Condensed attention of heads that are split over the processes in order; all heads' output.

    Args:
        query: ``[B, Hq / processes, Lq, D]``, this process's.
        key: ``[B, Hkv / processes, Lk, D]``.
        value: like ``key``.
    """
    out, _ = attention_forward(query, key, value, **BUDGET, estimate=False)
    outs = [torch.empty_like(out) for _ in range(dist.get_world_size())]
    dist.all_gather(outs, out)
    return torch.cat(outs, dim=1)


def main() -> None:
    gpus = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    dist.init_process_group("nccl" if gpus else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    rng = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4 * processes, 200, 64, generator=rng)
    key, value = torch.randn(2, 1, 2 * processes, 1500 * processes, 64, generator=rng)
    dtype = torch.bfloat16 if gpus else torch.float32
    query, key, value = (t.to(device, dtype) for t in (query, key, value))

    stretch, heads = slice(1500 * rank, 1500 * (rank + 1)), slice(2 * rank, 2 * (rank + 1))
    out, lse = context_parallel(query, key[:, :, stretch], value[:, :, stretch])
    everything = dict(topk=64 * 1500 * processes, estimate=False)
    whole, whole_lse = attention_forward(query, key, value, **everything)
    of_heads = slice(4 * rank, 4 * (rank + 1))
    split = tensor_parallel(query[:, of_heads], key[:, heads], value[:, heads])
    together, _ = attention_forward(query, key, value, **BUDGET, estimate=False)
    if rank == 0:
        print(f"{processes} processes, {'NCCL' if gpus else 'gloo'}, {dtype}")
        print(f"context parallel: largest difference {(out - whole).abs().max():.2e}, "
              f"log-sum-exp {(lse - whole_lse).abs().max():.2e}")  # fmt: skip
        print(f"tensor parallel: {'equal' if torch.equal(split, together) else 'NOT equal'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
