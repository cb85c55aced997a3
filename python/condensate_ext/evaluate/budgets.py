"""How many keys a policy's lists hold, where that depends on what is in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from condensate_ext.evaluate.policies import Policy, effective, of_prompts
from condensate_ext.evaluate.runs import decode_logits, prefill
from condensate_ext.evaluate.support import lists
from condensate_ext.ops import attention
from condensate_ext.transformers import replaced_attention

_BLOCK = 64


@torch.no_grad()
def mean_keys(model: Any, ids: Tensor, policy: Policy, decode_tokens: int = 16) -> float:
    """Keys per query: anchors, window, and what lists hold on average over layers and KV heads.

    Args:
        model: a causal LM in eval mode.
        ids: ``[B, n]`` int64; all but the last ``decode_tokens`` are prefilled densely, those are
            fed one at a time through the policy, whose lists are counted.
        policy: of a selector that lists blocks.
        decode_tokens: tokens whose lists are counted.
    """
    blocks: list[Tensor] = []

    def counted(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
        _, counts = lists(query, key, policy, scale=scale)
        blocks.append(counts.double().mean())
        return attention(query, key, value, scale=scale, **of_prompts(policy))

    cache = prefill(model, ids[:, :-decode_tokens])
    with replaced_attention(model, counted):
        decode_logits(model, cache, ids[:, -decode_tokens:])
    listed = _BLOCK * float(torch.stack(blocks).mean())
    return float(effective(policy, "anchors") + effective(policy, "window")) + listed
