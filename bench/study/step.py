"""One decoding step of one KV head, emulated in float32: what it attends, and how.

    the cache       | anchors | units of 8 keys .......................... | window |
    1. scan                     a mean key a unit, scored by every head
    2. shortlist                ####      ####           ####       ####
    3. scores                   every key of it, exactly, by every head
    4. tokens                   # #        #             ##            #
    5. attention      anchors, window, tokens; what is left as pools of mean values

Every position has lists of its own, which the G heads of the KV head share. L positions end N
keys, and units and pools divide N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

ANCHORS, WINDOW = 64, 256
CENTER_KEYS = 1024  # the first keys, whose mean may be taken off before rounding
STEP = 8  # positions of a speculative step
INF = float("inf")


@dataclass(frozen=True)
class Policy:
    """`docs/ablations.md`, "What a decoding step attends", says what each choice is worth."""

    keys: int = 1024  # attended a row, anchors and window included; 0: all
    shortlist: int = 4096
    unit: int = 8
    pool: int = 256
    # What the keys of a pool that are not attended weigh: their number times e to their mean
    # score, by units or by the pool ("unit", "pool"); the sum of e to what is known of them, the
    # unit's mean or the key's score ("mass"); that without shortlisted keys ("unscored").
    weight: Literal["unit", "pool", "mass", "unscored", "none"] = "unscored"
    subtract: bool = False  # attended values from a pool's sum
    means: Literal["float", "int8", "centered int8"] = "float"
    query: Literal["float", "int8"] = "float"  # in the scan
    values: Literal["float", "bfloat16", "int8"] = "float"  # of the pools
    normaliser: Literal["sum", "max"] = "sum"  # of a head's units, before heads are compared
    share: Literal["nothing", "shortlist", "tokens"] = "nothing"  # by the positions of a STEP
    top_p: float | None = None
    e4m3: str = ""  # "k", "v" or "kv": the cache, one scale a head
    operator: bool = False  # by the package's own operator instead, as docs/decoding.md has it


class Outcome(NamedTuple):
    output: Tensor  # [G, L, d]
    tokens: Tensor  # [L] listed, without anchors and window
    omitted: Tensor  # [G, L] mass that was not attended
    estimate: Tensor  # [G, L] of it, from what the step knows


class Scores(NamedTuple):
    """Relative to the row's largest; -inf where the key is of the future."""

    keys: Tensor  # [G, L, N]
    units: Tensor  # [G, L, N / unit]
    seen: Tensor  # [L, N / unit] keys of a unit that are not of the future


class Lists(NamedTuple):
    held: Tensor  # [L, ANCHORS + WINDOW] keys
    units: Tensor  # [L, S / unit], shortlisted
    keys: Tensor  # [L, S], theirs
    scores: Tensor  # [G, L, S], theirs; -inf where the key is held
    listed: Tensor  # [L, T] places in `keys`, heaviest first
    kept: Tensor  # [L, T] 1, or 0 where the key is held, or more than top_p asks for


class Chosen(NamedTuple):
    """Anchors, window and listed tokens."""

    keys: Tensor  # [L, A]
    kept: Tensor  # [L, A] 1, or 0 for a token that is not attended
    scores: Tensor  # [G, L, A]


def int8(rows: Tensor) -> Tensor:
    scale = rows.abs().amax(-1, keepdim=True).clamp_min(1e-20) / 127
    return (rows / scale).round() * scale


def e4m3(head: Tensor) -> Tensor:
    scale = head.abs().amax() / 448
    return (head / scale).to(torch.float8_e4m3fn).float() * scale


ROUND = {"float": lambda x: x, "bfloat16": lambda x: x.bfloat16().float(), "int8": int8}


def take(scores: Tensor, keys: Tensor) -> Tensor:
    """Every head's scores ``[G, L, A]`` of keys ``[L, A]``."""
    return scores.gather(2, keys.expand(len(scores), -1, -1))


def add_up(groups: int, places: Tensor, amounts: Tensor) -> Tensor:
    """Sums ``[.., L, groups]`` of amounts ``[.., L, A]`` by the group ``[L, A]`` they belong to."""
    sums = torch.zeros(*amounts.shape[:-1], groups)
    return sums.scatter_add_(-1, places.expand(amounts.shape), amounts)


def grouped(x: Tensor, ratio: int) -> Tensor:
    parts: Tensor = x.unflatten(-1, (-1, ratio))
    return parts.sum(-1)


def scan(policy: Policy, q: Tensor, k: Tensor, scale: float) -> Scores:
    L, N, unit = q.shape[1], len(k), policy.unit
    position = torch.arange(N - L, N)[:, None]
    keys = (q @ k.T) * scale
    keys[..., N - L :].masked_fill_(torch.arange(N - L, N) > position, -INF)
    mean = k.unflatten(0, (-1, unit)).mean(1)
    rows = ROUND[policy.query](q)
    if policy.means == "centered int8":
        center = k[:CENTER_KEYS].mean(0)
        units = (rows @ int8(mean - center).T + (q @ center)[..., None]) * scale
    else:
        units = rows @ ROUND[policy.means](mean).T * scale
    seen = (position + 1 - torch.arange(0, N, unit)).clamp(0, unit).float()
    tail = (N - L) // unit  # whose means hold keys of the future
    sums = grouped(keys[..., tail * unit :].nan_to_num(neginf=0), unit)
    units[..., tail:] = torch.where(seen[:, tail:] > 0, sums / seen[:, tail:].clamp_min(1), -INF)
    top = keys.amax(-1, keepdim=True)
    return Scores(keys.sub_(top), units.sub_(top), seen)


def over_step(rank: Tensor) -> Tensor:
    """The largest rank among the positions of a step, for each of them."""
    steps: Tensor = rank.unflatten(0, (-1, STEP))
    return steps.amax(1).repeat_interleave(STEP, 0)


def make_lists(policy: Policy, scores: Scores) -> Lists:
    _, L, N = scores.keys.shape
    unit = policy.unit
    window = torch.arange(N - L, N)[:, None] - WINDOW + 1
    if policy.normaliser == "sum":
        size = torch.logsumexp(scores.units + scores.seen.log(), -1, keepdim=True)
    else:
        size = scores.units.amax(-1, keepdim=True)
    first = torch.arange(0, N, unit)
    rank = (scores.units - size).amax(0)
    rank = rank.masked_fill((first < ANCHORS) | (first >= window), -INF)
    if policy.share != "nothing":
        rank = over_step(rank)
    units = rank.topk(min(policy.shortlist, N - ANCHORS - WINDOW) // unit, -1).indices.sort(-1)[0]

    keys = (units[..., None] * unit + torch.arange(unit)).flatten(1)
    free = (keys >= ANCHORS) & (keys < window)
    exact = take(scores.keys, keys).masked_fill(~free, -INF)
    held = torch.cat([torch.arange(ANCHORS).expand(L, -1), window + torch.arange(WINDOW)], 1)
    size = torch.logsumexp(torch.cat([exact, take(scores.keys, held)], -1), -1, keepdim=True)
    mass = (exact - size).amax(0)
    if policy.share == "tokens":
        mass = over_step(mass)
    listed = mass.topk(min(policy.keys - ANCHORS - WINDOW, keys.shape[1]), -1).indices
    return Lists(held, units, keys, exact, listed, free.gather(1, listed).float())


def keep_enough(policy: Policy, scores: Scores, lists: Lists, means: Tensor) -> Lists:
    """Without the tokens after those with which every head has ``top_p`` of all that is known."""
    if policy.top_p is None:
        return lists
    held = take(scores.keys, lists.held).exp().sum(-1, keepdim=True)
    known = held + lists.scores.exp().sum(-1, keepdim=True) + means.sum(-1, keepdim=True)
    listed = take(lists.scores, lists.listed).exp()
    before = held + listed.cumsum(-1) - listed
    return lists._replace(kept=lists.kept * (before < policy.top_p * known).any(0))


def mean_weights(group: int, sums: Tensor, seen: Tensor, chosen: Chosen) -> Tensor:
    """What the keys of every group that are not attended weigh: ``n e^(mean score)``.

    ``sums`` [G, L, groups] are a group's scores, ``seen`` [L, groups] its keys.
    """
    place = chosen.keys // group
    left = seen - add_up(seen.shape[1], place, chosen.kept)
    scores = chosen.scores.nan_to_num(neginf=0) * chosen.kept
    mean = (sums - add_up(seen.shape[1], place, scores)) / left.clamp_min(1)
    return torch.where(left > 0.5, left * mean.exp(), 0.0)


def far_weights(
    policy: Policy, scores: Scores, lists: Lists, means: Tensor, chosen: Chosen
) -> tuple[Tensor, Tensor]:
    """What pools weigh ``[G, L, pools]``, by the policy and by the sum of all that is known."""
    pools, ratio = scores.keys.shape[2] // policy.pool, policy.pool // policy.unit
    unscored = grouped(means, ratio)
    listed = lists.listed.expand(len(means), -1, -1)
    unlisted = lists.scores.exp()
    unlisted.scatter_(2, listed, unlisted.gather(2, listed) * (1 - lists.kept))
    mass = unscored + add_up(pools, lists.keys // policy.pool, unlisted)
    sums = scores.units.nan_to_num(neginf=0) * scores.seen
    if policy.weight == "unit":
        weights = grouped(mean_weights(policy.unit, sums, scores.seen, chosen), ratio)
    elif policy.weight == "pool":
        sums, seen = grouped(sums, ratio), grouped(scores.seen, ratio)
        weights = mean_weights(policy.pool, sums, seen, chosen)
    else:
        known = {"mass": mass, "unscored": unscored, "none": torch.zeros_like(mass)}
        weights = known[policy.weight]
    return weights, mass


def attend(policy: Policy, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Outcome:
    """Attention of the last L positions of N keys: ``q`` [G, L, d], ``k`` and ``v`` [N, d]."""
    k = e4m3(k) if "k" in policy.e4m3 else k
    v = e4m3(v) if "v" in policy.e4m3 else v
    scores = scan(policy, q, k, scale)
    everything = scores.keys.exp().sum(-1)
    if policy.keys == 0:
        zero = torch.zeros_like(everything)
        return Outcome(scores.keys.exp() @ v / everything[..., None], zero[0], zero, zero)
    lists = make_lists(policy, scores)
    held = add_up(scores.seen.shape[1], lists.held // policy.unit, torch.ones(lists.held.shape))
    means = (scores.seen - held) * scores.units.exp()  # units outside the shortlist
    means.scatter_(2, lists.units.expand(len(q), -1, -1), 0.0)
    lists = keep_enough(policy, scores, lists, means)

    keys = torch.cat([lists.held, lists.keys.gather(1, lists.listed)], 1)
    kept = torch.cat([torch.ones(lists.held.shape), lists.kept], 1)
    chosen = Chosen(keys, kept, take(scores.keys, keys))
    far, mass = far_weights(policy, scores, lists, means, chosen)

    near = chosen.scores.exp() * kept
    attended = near.sum(-1)
    pooled = grouped(v.T, policy.pool).T  # sums
    if policy.subtract:
        place = keys // policy.pool
        left = grouped(scores.seen, policy.pool // policy.unit) - add_up(len(pooled), place, kept)
        share = torch.where(left > 0.5, far / left.clamp_min(1), 0.0)
        output = share @ pooled
        near = near - take(share, place) * kept
    else:
        output = far @ ROUND[policy.values](pooled / policy.pool)
    output += torch.einsum("gla,lad->gld", near, v[keys])
    output /= (attended + far.sum(-1))[..., None]
    omitted, estimate = 1 - attended / everything, mass.sum(-1) / (mass.sum(-1) + attended)
    return Outcome(output, lists.kept.sum(-1), omitted, estimate)
