"""The ops in plain float32 torch: what the kit's own tests feed it, sound or with a planted fault.

Faults are named by what they break; the kit has to reject every one of them.
"""

from __future__ import annotations

import torch
from condensate_ext import ErrorWord
from torch import Tensor

from tests.testkit import far_field, oracle, selection
from tests.testkit.definition import (
    BLOCK_KEYS,
    Budget,
    Ranges,
    listed_blocks,
    spread_to_rows,
    support_of_lists,
    support_of_pairs,
)

FAULTS = (
    "window_edge", "anchor_edge", "diagonal", "alignment", "drop_one_key", "double_count",
    "scale", "no_lse_term", "tie_rule", "budget", "order", "padding", "eligibility", "weight",
    "norm", "shortlist", "refinement", "head_budget", "short_list",
    "pool_weight", "pool_twice", "pool_border", "far_end", "pool_value",
    "selections_estimate", "gap", "gap_blocks", "error_word",
)  # fmt: skip


class NaiveOps:
    """Stands in for torch.ops.condensate."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.error_word = ErrorWord.NONE

    def read_error_word(self, device: str) -> ErrorWord:
        word, self.error_word = self.error_word, ErrorWord.NONE
        return word

    def _ranges(self, lq: int, lk: int, window: int, anchors: int, causal: bool) -> Ranges:
        window -= self.fault == "window_edge" and window > 0
        anchors -= self.fault == "anchor_edge" and anchors > 0
        return Ranges(lq, lk, window, anchors, causal)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, support: Tensor, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        if self.fault == "diagonal" and support.shape[-1]:
            lq, lk = support.shape[-2:]
            support = support & ~torch.ones(lq, lk, dtype=torch.bool).triu(lk - lq).tril(lk - lq)
        if self.fault == "alignment":
            support = support.roll(1, -1)
        if self.fault == "drop_one_key" and support.shape[-1] > 70:
            support = support.clone()
            support[..., 70] = False
        factor = oracle.default_scale(query.shape[-1]) if scale is None else scale
        factor *= 1.001 if self.fault == "scale" else 1.0
        score = factor * (query.float() @ oracle.expand_heads(key, query.shape[1]).float().mT)
        score = score.masked_fill(~support, -torch.inf)
        if self.fault == "double_count" and score.shape[-1]:
            score[..., 0] += 0.6931
        lse = torch.logsumexp(score, -1)
        prob = torch.where(support, (score - lse[..., None]).exp(), 0.0)
        prob = prob * (1.02 if self.fault == "weight" else 1.0)
        out = prob @ oracle.expand_heads(value, query.shape[1]).float()
        return out.to(query.dtype), lse - (0.01 if self.fault == "no_lse_term" else 0.0)

    def _condense(  # type: ignore[no-untyped-def]
        self, query, key, value, ranges, listed, means, scale
    ):
        """Every pool as one more key of each row, whose score counts the keys it stands for."""
        kv_len, heads = key.shape[2], query.shape[1]
        division = far_field.divide(ranges, listed, heads)
        condensed = division.condensed
        if self.fault == "far_end":  # one block short
            condensed = condensed & condensed.roll(-1, -1)
        if self.fault == "pool_twice":
            condensed = condensed | listed & (condensed.any(-1, keepdim=True))
        if self.fault == "pool_border" and condensed.shape[-1] > 2:
            condensed = condensed.clone()
            condensed[..., 2] = False
        division = far_field.Division(
            division.walked, condensed, division.attended, division.counted
        )
        rows = [far_field.pool_rows(m, division, kv_len).mean for m in means]
        pooled_key, pooled_value = (r.to(query.dtype).float() for r in rows)
        pooled_value = pooled_value * (1.03 if self.fault == "pool_value" else 1.0)
        count = far_field.count_keys(division, kv_len).float()
        tiles = far_field.Tiles(query, key.shape[1])
        factor = oracle.default_scale(query.shape[-1]) if scale is None else scale
        score = factor * (query.float() @ oracle.expand_heads(key, heads).float().mT)
        far = factor * tiles.times(query.float(), pooled_key.mT)
        rows_count = spread_to_rows(count, heads, query.shape[2])
        far = far + (rows_count.clamp(max=1) if self.fault == "pool_weight" else rows_count).log()
        terms = torch.cat([score.masked_fill(~division.attended, -torch.inf), far], -1)
        lse = torch.logsumexp(terms, -1)
        prob = torch.where(terms > -torch.inf, (terms - lse[..., None]).exp(), 0.0)
        of_keys, of_pools = prob.split([kv_len, far.shape[-1]], -1)
        out = of_keys @ oracle.expand_heads(value, heads).float()
        out = out + tiles.times(of_pools, pooled_value)
        return out.to(query.dtype), lse

    def _far_estimate(  # type: ignore[no-untyped-def]
        self, query, key, ranges, listed, key_means, scale
    ):
        heads, group = query.shape[1], query.shape[1] // key.shape[1]
        division = far_field.divide(ranges, listed, heads)
        sampled = far_field.sampled_blocks(ranges, listed, group)
        if self.fault == "gap":
            sampled = torch.zeros_like(sampled)
        if self.fault == "gap_blocks":
            sampled = sampled & (sampled.cumsum(-1) <= 1)  # the first one alone
        return far_field.estimated_omission(query, key, division, key_means, sampled, scale).share

    def block_sparse_attention(  # type: ignore[no-untyped-def]
        self, query, key, value, indices, counts, *, window, anchors, far_field, causal, scale
    ):
        ranges = self._ranges(query.shape[2], key.shape[2], window, anchors, causal)
        listed, invalid = listed_blocks(indices, counts, key.shape[2])
        if invalid and self.fault != "error_word":
            self.error_word |= ErrorWord.BLOCK_INDEX
        if far_field:
            means = [self.block_summaries(t, selector="mean") for t in (key, value)]
            return self._condense(query, key, value, ranges, listed, means, scale)
        support = support_of_lists(ranges, listed, query.shape[1])
        return self._attend(query, key, value, support, scale)

    def block_summaries(self, key: Tensor, *, selector: str) -> Tensor:
        return selection.units(key, selector).to(key.dtype)

    def select_blocks(  # type: ignore[no-untyped-def]
        self, query, summaries, key=None, *, kv_len, topk, topk_per_head, top_p, selector, window,
        anchors, far_field, causal, scale,
    ):  # fmt: skip
        ranges = self._ranges(query.shape[2], kv_len, window, anchors, causal)
        query = -query if self.fault == "order" else query
        key = None if self.fault == "refinement" else key
        scores = selection.Scores(
            query, summaries, ranges, selector, scale, key=key, far_field=far_field
        )
        chosen = self._choose(scores, self._budget(topk, topk_per_head, top_p))
        counts = chosen.sum(-1).int()
        blocks = chosen.shape[-1]
        ascending = torch.where(chosen, torch.arange(blocks), blocks).sort(-1).values
        filler = 0 if self.fault == "padding" else -1
        indices = torch.full((*counts.shape, topk // BLOCK_KEYS), filler, dtype=torch.int32)
        width = min(indices.shape[-1], blocks)
        kept = ascending[..., :width]
        indices[..., :width] = torch.where(kept < blocks, kept, filler).int()
        return indices, counts

    def _budget(self, topk: int, per_head: Tensor | None, top_p: float | None) -> Budget:
        if self.fault == "budget" and topk > 0:
            topk -= BLOCK_KEYS
        if self.fault == "head_budget" and per_head is not None:
            per_head = per_head.flip(0).clamp(min=BLOCK_KEYS)
        if self.fault == "short_list" and top_p is not None:
            top_p = 0.9 * top_p
        return Budget(topk, top_p, None if per_head is None else tuple(per_head.tolist()))

    def _choose(self, scores: selection.Scores, budget: Budget) -> Tensor:
        if self.fault == "eligibility":
            scores.eligible = scores.eligible.roll(1, -1)
        if self.fault == "norm":
            scores.scan_whole = scores.scan_part
        if self.fault == "shortlist" and scores.refinement:
            rank = scores.eligible.int().cumsum(-1)
            shortlist = scores.eligible & (
                rank <= selection.shortlist_width(scores.refinement, budget.width)
            )
            mass = scores.refined((shortlist | scores.beside).expand(scores.scanned.shape))
            most = budget.of_heads(scores.kv_heads, mass.device)
            return selection.expected_lists(mass, shortlist, most, budget.top_p)[0]
        return selection.expected_choice(scores, budget)[0]

    def select_tokens(  # type: ignore[no-untyped-def]
        self, query, key, *, topk, window, anchors, causal, scale
    ):
        ranges = self._ranges(query.shape[2], key.shape[2], window, anchors, causal)
        score = oracle.scores(query, key, scale).float()
        candidates = ranges.candidates()
        order = score.flip(-1) if self.fault == "tie_rule" else score
        allowed = candidates.flip(-1) if self.fault == "tie_rule" else candidates
        chosen = selection.expected_tokens(order, allowed, topk - (self.fault == "budget"))
        chosen = chosen.flip(-1) if self.fault == "tie_rule" else chosen
        few = candidates.sum(-1).expand(chosen.shape[:-1]) < topk
        least = score.masked_fill(~chosen, torch.inf)
        threshold = torch.nn.functional.pad(least, (0, 1), value=torch.inf).amin(-1)
        at = chosen & (score == threshold[..., None])
        last = torch.where(at, torch.arange(key.shape[2]), -1)
        tie = torch.nn.functional.pad(last, (0, 1), value=-1).amax(-1)
        threshold = threshold.masked_fill(few, -torch.inf)
        return threshold, tie.masked_fill(few, 2**31 - 1).int()

    def attention_forward(  # type: ignore[no-untyped-def]
        self, query, key, value, *, topk, topk_per_head, top_p, selector, window, anchors,
        far_field, causal, scale,
    ):  # fmt: skip
        args = {"window": window, "anchors": anchors, "causal": causal, "scale": scale}
        ranges = self._ranges(query.shape[2], key.shape[2], window, anchors, causal)
        if selector == "exact":
            pair = self.select_tokens(query, key, topk=topk, **args)
            score = oracle.scores(query, key, scale).float()
            out, lse = self._attend(
                query, key, value, support_of_pairs(ranges, score, *pair), scale
            )
            estimate = oracle.omitted_mass(query, key, lse, ranges.visible(), scale)
            return out, lse, estimate.float()
        units = self.block_summaries(key, selector=selector)
        lists = self.select_blocks(
            query, units, key, kv_len=key.shape[2], topk=topk, topk_per_head=topk_per_head,
            top_p=top_p, selector=selector, far_field=far_field, **args,
        )  # fmt: skip
        chosen, _ = listed_blocks(*lists, key.shape[2])
        scores = selection.Scores(
            query, units, ranges, selector, scale, key=key, far_field=far_field
        )
        budget = self._budget(topk, topk_per_head, top_p)
        estimate, _ = selection.estimated_omission(scores, chosen, budget)
        if far_field:
            means = [self.block_summaries(t, selector="mean") for t in (key, value)]
            state = self._condense(query, key, value, ranges, chosen, means, scale)
            if query.shape[2] > 1 and self.fault != "selections_estimate":
                estimate = self._far_estimate(query, key, ranges, chosen, means[0], scale)
            return *state, estimate.float()
        support = support_of_lists(ranges, chosen, query.shape[1])
        return *self._attend(query, key, value, support, scale), estimate.float()
