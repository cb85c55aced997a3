"""One random case through the ops against the definition: numbers, membership, selection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import condensate_ext as ops
import torch
from condensate_ext._token_selection import select_tokens
from torch import Tensor

from tests.testkit import far_field, markers, oracle, selection
from tests.testkit.cases import Case
from tests.testkit.definition import (
    COARSE,
    listed_blocks,
    support_of_lists,
    support_of_pairs,
    tile_positions,
)
from tests.testkit.poison import poisoned_outputs, recycle_nan_memory


@dataclass
class Outcome:
    """What a case has shown."""

    bound_used: float = 0.0  # largest error as a share of its bound
    probes: int = 0  # (row, key) pairs whose membership was read off an output


def check_case(case: Case) -> Outcome:
    """Assert everything that the definition says about the case."""
    rows = (case.batch, case.query_heads, case.query_len)
    with poisoned_outputs():
        recycle_nan_memory((*rows, case.head_dim), dtype=case.dtype, device=case.device)
        recycle_nan_memory(rows, rows, dtype=torch.float32, device=case.device)
        if case.selector in ("lists", "hostile"):
            return _check_given_lists(case)
        if case.selector == "exact":
            return _check_exact(case)
        return _check_block_selector(case)


def _probe_keys(case: Case) -> Tensor:
    """All keys where that is a few calls, otherwise those at edges and some random ones."""
    if case.kv_len <= 3 * case.head_dim:
        return torch.arange(case.kv_len, device=case.device)
    positions = tile_positions(case.group)
    edges = markers.edge_keys(case.query_len, case.kv_len, case.window, case.anchors, positions)
    generator = torch.Generator().manual_seed(case.seed)
    picked = torch.tensor(edges)[torch.randperm(len(edges), generator=generator)]
    anywhere = torch.randint(0, case.kv_len, (case.head_dim,), generator=generator)
    return torch.cat([picked, anywhere]).unique()[: 3 * case.head_dim].to(case.device)


def _check_given_lists(case: Case) -> Outcome:
    query, key, value = case.tensors()
    indices, counts = case.lists()

    def run(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = ops.block_sparse_attention(q, key, v, indices, counts, **case.attention_args)
        return out, lse

    listed, invalid = listed_blocks(indices, counts, case.kv_len)
    if case.far_field:
        outcome = _check_condensing(case, run, listed, (query, key, value))
    else:
        support = support_of_lists(case.ranges, listed, case.query_heads)
        outcome = _check_attention(case, run, support, (query, key, value))
    assert bool(ops.read_error_word(case.device)) == bool(invalid), "the error word is wrong"
    return outcome


Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # query, value -> out, lse


def _check_attention(
    case: Case, run: Run, support: Tensor, qkv: tuple[Tensor, Tensor, Tensor]
) -> Outcome:
    query, key, value = qkv
    out, lse = run(query, value)
    assert out.is_contiguous() and out.dtype == case.dtype
    used = oracle.assert_matches(oracle.attention(query, key, value, support, case.scale), out, lse)
    keys = _probe_keys(case)
    silent = torch.zeros_like(query)
    found = markers.attended(lambda marked: run(silent, marked)[0], value, keys)
    assert torch.equal(found, support[..., keys]), "the marker probe found another support"
    return Outcome(used, found.numel())


def _check_condensing(
    case: Case, run: Run, listed: Tensor, qkv: tuple[Tensor, Tensor, Tensor]
) -> Outcome:
    """Attended keys and, in pools, the keys of every other block that a tile sees in full."""
    query, key, value = qkv
    division = far_field.divide(case.ranges, listed, case.query_heads)
    out, lse = run(query, value)
    assert out.is_contiguous() and out.dtype == case.dtype
    reference = far_field.attention(
        query, key, value, division, far_field_means(case, key, value), case.scale
    )
    used = oracle.assert_matches(reference, out, lse)
    return Outcome(used, _check_counts(case, run, division, query, value))


def far_field_means(case: Case, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The means of blocks that a call condenses by, as the ops round them."""
    means = ops.block_summaries(value, selector="mean")
    if case.selector != "block":
        return ops.block_summaries(key, selector="mean"), means
    summaries = ops.block_summaries(key, selector="block")
    return selection.level_of(summaries, "block", COARSE), means


def _check_counts(
    case: Case, run: Run, division: far_field.Division, query: Tensor, value: Tensor
) -> int:
    """With queries of 0 all keys that count, attended or condensed, weigh the same: each is in the
    softmax exactly once, and nothing else is."""
    keys, silent = _probe_keys(case), torch.zeros_like(query)
    total = division.counted.sum(-1).double()
    lse = run(silent, value)[1]
    assert torch.equal(lse == -torch.inf, total == 0)
    assert ((lse.double() - total.log()).abs()[total > 0] < 2e-5).all(), "the weights do not add up"
    share = markers.weights(lambda marked: run(silent, marked)[0], value, keys)
    counted = division.counted[..., keys].double()
    error = (share * total[..., None] - counted).abs()
    # A mean, its pool's mean and the output are rounded.
    assert (error <= 4 * oracle.UNIT_ROUNDOFF[case.dtype] + 1e-4).all(), "not each key once"
    return share.numel()


def _check_block_selector(case: Case) -> Outcome:
    query, key, value = case.tensors()
    summaries = ops.block_summaries(key, selector=case.selector)
    selection.check_summaries(key, summaries, case.selector)
    if case.query_len == 1:
        _check_lists(case, query, summaries, None)
    scores, chosen = _check_lists(case, query, summaries, key)
    out, lse, estimate = ops.attention_forward(
        query, key, value, **case.selection_args, **case.attention_args
    )
    check_estimate(case, scores, chosen, (query, key, value), estimate)
    if case.far_field:
        division = far_field.divide(case.ranges, chosen, case.query_heads)
        means = far_field_means(case, key, value)
        reference = far_field.attention(query, key, value, division, means, case.scale)
        return Outcome(oracle.assert_matches(reference, out, lse))
    support = support_of_lists(case.ranges, chosen, case.query_heads)
    reference = oracle.attention(query, key, value, support, case.scale)
    return Outcome(oracle.assert_matches(reference, out, lse))


def check_estimate(
    case: Case,
    scores: selection.Scores,
    chosen: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    estimate: Tensor,
) -> None:
    """That of a call which lists the chosen blocks: the attention's own where it condenses for
    several queries, else the selection's."""
    if case.far_field and case.query_len > 1:
        far_field.check_estimate(far_estimate(case, chosen, qkv), estimate)
    else:
        selection.check_estimate(scores, estimate, chosen, case.budget)


def far_estimate(
    case: Case, chosen: Tensor, qkv: tuple[Tensor, Tensor, Tensor]
) -> far_field.Estimate:
    """What the attention of a far-field call estimates from its own scores."""
    query, key, value = qkv
    division = far_field.divide(case.ranges, chosen, case.query_heads)
    sampled = far_field.sampled_blocks(case.ranges, chosen, case.group)
    means, _ = far_field_means(case, key, value)
    return far_field.estimated_omission(query, key, division, means, sampled, case.scale)


def scored_lists(
    case: Case, query: Tensor, summaries: Tensor, key: Tensor | None
) -> tuple[selection.Scores, tuple[Tensor, Tensor]]:
    """The case's scores by the definition, and the lists of select_blocks; with the keys they are
    those of attention."""
    lists = ops.select_blocks(
        query, summaries, key, kv_len=case.kv_len, **case.selection_args, **case.attention_args
    )
    scores = selection.Scores(
        query, summaries, case.ranges, case.selector, case.scale, key=key,
        far_field=case.far_field, exact=case.content == "integers",
    )  # fmt: skip
    return scores, lists


def _check_lists(
    case: Case, query: Tensor, summaries: Tensor, key: Tensor | None
) -> tuple[selection.Scores, Tensor]:
    scores, lists = scored_lists(case, query, summaries, key)
    return scores, selection.check_lists(scores, *lists, case.budget)


def _check_exact(case: Case) -> Outcome:
    query, key, value = case.tensors()

    def run(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, lse, estimate = ops.attention_forward(
            query, key, v, **case.selection_args, **case.attention_args
        )
        return out, lse, estimate

    support = markers.extract_support(lambda marked: run(marked)[0], value)
    score = oracle.scores(query, key, case.scale)
    check_token_support(case, support, score)
    if case.content == "integers":
        threshold, tie = select_tokens(query, key, topk=case.topk, **case.range_args)
        pairs = support_of_pairs(case.ranges, score, threshold, tie)
        assert torch.equal(pairs, support), "select_tokens names other keys than are attended"
    out, lse, estimate = run(value)
    reference = oracle.attention(query, key, value, support, case.scale)
    used = oracle.assert_matches(reference, out, lse)
    full = oracle.omitted_mass(query, key, reference.lse, case.ranges.visible(), case.scale)
    error = (estimate.double() - full).abs().flatten(0, 1)
    assert (error <= 2 * reference.lse_bound.nan_to_num(posinf=0.0).flatten(0, 1)).all()
    return Outcome(used, support.numel())


def check_token_support(case: Case, support: Tensor, score: Tensor) -> None:
    """The support holds the ranges and a right top-k of the candidates, and nothing else."""
    always, candidates = case.ranges.always(), case.ranges.candidates()
    assert torch.equal(support & ~candidates, always.expand_as(support)), "wrong ranges"
    if case.content == "integers":
        expected = selection.expected_tokens(score, candidates, case.topk)
        assert torch.equal(support & candidates, expected), "another top-k than the definition's"
        return
    chosen = support & candidates
    wanted = candidates.sum(-1).clamp(max=case.topk).expand(chosen.shape[:-1])
    assert torch.equal(chosen.sum(-1), wanted), "wrong number of selected keys"
    ranked = score.masked_fill(~candidates, -torch.inf)
    if not 0 < case.topk < case.kv_len:
        return
    kth = ranked.topk(case.topk, -1).values[..., -1:]
    size = oracle.scores(*(t.abs() for t in case.tensors()[:2]), case.scale)
    band = 4 * (case.head_dim + 4) * oracle.EPS * size
    assert not (candidates & ~chosen & (score > kth + band)).any(), "a clearly larger key is out"
    assert not (chosen & (score < kth - band)).any(), "a clearly smaller key is in"
