"""Runs vLLM's engine over scenarios in a process of its own: `python engine_run.py MODEL OUT`.

Writes, for each scenario, the tokens of every request, how often the scheduler preempted one, and
how many tokens came from cached prefixes. With CHECK=1 every layer and batch of the plugin is also
computed by the package's ops over a contiguous copy, and the largest difference is written.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch

VOCABULARY = 97
BASE = dict(
    dtype="float32", max_model_len=1024, enforce_eager=True, skip_tokenizer_init=True,
    disable_log_stats=False, max_num_seqs=4, enable_prefix_caching=False, block_size=64,
)  # fmt: skip
SCENARIOS = {
    "whole_prompts": dict(enable_chunked_prefill=False, max_num_batched_tokens=2048),
    "chunks": dict(enable_chunked_prefill=True, max_num_batched_tokens=96),
    "prefix": dict(enable_prefix_caching=True, max_num_batched_tokens=2048),
    "preemption": dict(num_gpu_blocks_override=20, max_num_batched_tokens=1024),
}


def prompts() -> list[list[int]]:
    """Mixed lengths; the last two share a prefix of ten pages."""
    rng = torch.Generator().manual_seed(5)
    made = [torch.randint(0, VOCABULARY - 1, (n,), generator=rng).tolist()
            for n in (5, 300, 64, 701, 129, 640)]  # fmt: skip
    return [*made, made[-1] + [1, 2, 3] * 9]


def check_attend(seen: dict[str, float]) -> None:
    """Makes every batch of the plugin compare itself with a contiguous copy."""
    from condensate_ext import KVSummaries, attention, attention_with_kvcache
    from condensate_ext.vllm.cache import LayerCache

    attend = LayerCache.attend

    def checked(self, query, out, lengths, table, runs, settings, scale):
        attend(self, query, out, lengths, table, runs, settings, scale)
        common = dict(window=settings.window, anchors=settings.anchors, scale=scale)
        for run in runs:
            for b in range(run.first, run.last):
                begin = run.token + (b - run.first) * run.query_len
                rows, length = slice(begin, begin + run.query_len), lengths[b : b + 1]
                j = torch.arange(int(length))
                size = self.key.shape[2]
                pages = table[b].long()[j // size]
                key, value = (t[pages, :, j % size].transpose(0, 1)[None].contiguous()
                              for t in (self.key, self.value))  # fmt: skip
                q = query[rows].transpose(0, 1)[None]
                if run.query_len > 16:
                    again = attention(q, key, value, topk=settings.prefill_topk, **common)
                else:
                    summaries = KVSummaries.empty_for(key, paged=False)
                    summaries.update_(key, value, length, appended=int(length))
                    again = attention_with_kvcache(
                        q, key, value, length, summaries=summaries, topk=settings.topk,
                        shortlist=settings.shortlist, **common,
                    )  # fmt: skip
                    selects = int(length) > settings.window + settings.anchors + settings.shortlist
                    seen["selected_steps"] += selects
                difference = (out[rows] - again[0].transpose(0, 1)).abs().max()
                seen["difference"] = max(seen["difference"], float(difference))

    LayerCache.attend = checked


def run(model: str, options: dict[str, object]) -> dict[str, object]:
    """One engine; the prompts but the last together, then the last."""
    from vllm import LLM, SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler

    count = {"preemptions": 0}
    preempt = Scheduler._preempt_request

    def counted(self, *args, **kwargs):
        count["preemptions"] += 1
        return preempt(self, *args, **kwargs)

    Scheduler._preempt_request = counted
    engine = LLM(model, **{**BASE, **options})
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    batches = [[{"prompt_token_ids": p} for p in part] for part in (prompts()[:-1], prompts()[-1:])]
    results = [r for batch in batches for r in engine.generate(batch, sampling, use_tqdm=False)]
    Scheduler._preempt_request = preempt
    return {
        "tokens": [list(r.outputs[0].token_ids) for r in results],
        "cached": [r.num_cached_tokens or 0 for r in results],
        **count,
    }


def main() -> None:
    model, out = sys.argv[1:]
    seen = {"difference": 0.0, "selected_steps": 0}
    if os.environ.get("CHECK") == "1":
        check_attend(seen)
    found: dict[str, object] = {}
    for name, options in SCENARIOS.items():
        found[name] = run(model, options)
        gc.collect()
    Path(out).write_text(json.dumps({**found, "seen": seen}), encoding="utf-8")


if __name__ == "__main__":
    main()
