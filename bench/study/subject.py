"""A model whose last tokens go through a policy over the dense cache of what is before them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from condensate_ext import KVSummaries, attention_with_kvcache
from condensate_ext.evaluate.text import read_windows
from torch import Tensor

from bench.study.step import ANCHORS, WINDOW, Policy, attend

_NAME = "condensate_study"


class Result(NamedTuple):
    """Means over the positions (and, from the third on, layers and heads)."""

    kl: float  # of the next token's distribution to dense attention's
    perplexity: float  # change, percent
    tokens: float
    omitted: float
    estimate_bias: float
    estimate_error: float  # absolute


class _Attention:
    """transformers' attention function: dense and remembered, or by a policy over what is."""

    def __init__(self) -> None:
        self.policy: Policy | None = None
        self.prefix = 0
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}
        self.notes: list[list[float]] = []

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        if self.policy is None:
            self.cache[module.layer_idx] = (
                key[0, :, : self.prefix].clone(), value[0, :, : self.prefix].clone(),
            )  # fmt: skip
            output = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True, scale=scaling
            )
            return output.transpose(1, 2), None
        old_keys, old_values = self.cache[module.layer_idx]
        keys, values = torch.cat([old_keys, key[0]], 1), torch.cat([old_values, value[0]], 1)
        if self.policy.operator:
            output = _by_operator(self.policy, query, keys[None], values[None], scaling)
            self.notes.append([float(self.policy.keys), torch.nan, torch.nan, torch.nan])
            return output.transpose(1, 2), None
        heads = []
        for q, k, v in zip(query[0].unflatten(0, (len(keys), -1)), keys, values, strict=True):
            outcome = attend(self.policy, q, k, v, scaling)
            off = outcome.estimate - outcome.omitted
            means = (outcome.tokens, outcome.omitted, off, off.abs())
            self.notes.append([x.mean().item() for x in means])
            heads.append(outcome.output)
        return torch.cat(heads)[None].transpose(1, 2), None


def _by_operator(
    policy: Policy, query: Tensor, keys: Tensor, values: Tensor, scale: float
) -> Tensor:
    """The queries, the last ones of the cache, through ``attention_with_kvcache``, 16 a call."""
    total, new = keys.shape[2], query.shape[2]
    summaries = KVSummaries.empty_for(keys, paged=False)
    summaries.update_(keys, values, torch.tensor([total], dtype=torch.int32), appended=total)
    outputs: list[Tensor] = []
    for begin in range(0, new, 16):
        end = min(begin + 16, new)
        lengths = torch.tensor([total - new + end], dtype=torch.int32)
        output = attention_with_kvcache(
            query[:, :, begin:end].contiguous(), keys, values, lengths, summaries=summaries,
            window=WINDOW, anchors=ANCHORS, shortlist=policy.shortlist,
            topk=policy.keys - WINDOW - ANCHORS, scale=scale,
        )  # fmt: skip
        assert isinstance(output, Tensor)
        outputs.append(output)
    return torch.cat(outputs, 2)


@dataclass(frozen=True)
class Subject:
    """The first ``context`` tokens of a window of text, the last ``tail`` of them by policies."""

    model: Any
    attention: _Attention
    ids: Tensor  # [context + 1]
    tail: int
    dense: Tensor  # [tail, vocabulary] log-probabilities
    caches: dict[int, tuple[Tensor, Tensor]]

    @torch.inference_mode()
    def run(self, policy: Policy) -> Result:
        self.attention.policy, self.attention.notes = policy, []
        self.attention.cache = self.caches
        context = len(self.ids) - 1
        positions = torch.arange(context - self.tail, context)[None]
        got = _log_probabilities(self.model, self.ids[positions], positions, self.tail)
        kl = (self.dense.exp() * (self.dense - got)).sum(-1).mean().item()
        worse = (self.dense - got).gather(1, self.ids[-self.tail :, None]).mean().exp().item() - 1
        notes = torch.tensor(self.attention.notes).mean(0).tolist()
        return Result(kl, 100 * worse, *notes)


def _log_probabilities(model: Any, ids: Tensor, positions: Tensor, tail: int) -> Tensor:
    hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    logits: Tensor = model.lm_head(hidden[:, -tail:])[0]
    return logits.log_softmax(-1)


@torch.inference_mode()
def load(
    path: Path, text: Path, *, gguf: str | None, context: int, tail: int, windows: int
) -> list[Subject]:
    """Dense attention over every window, once; ``gguf`` names a file of the folder ``path``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention = _Attention()
    ALL_ATTENTION_FUNCTIONS.register(_NAME, attention)
    kind = {} if gguf is None else {"gguf_file": gguf}
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kind)
    model.eval()
    model.set_attn_implementation(_NAME)
    tokenizer = AutoTokenizer.from_pretrained(path, **kind)
    subjects = []
    for window in read_windows(text, tokenizer, context + 1, windows):
        ids = torch.tensor(window.ids)
        attention.policy, attention.cache, attention.prefix = None, {}, context - tail
        positions = torch.arange(context)[None]
        dense = _log_probabilities(model, ids[None, :context], positions, tail)
        subjects.append(Subject(model, attention, ids, tail, dense, attention.cache))
    return subjects
