"""A budget that reaches every key is dense attention."""

from __future__ import annotations

from dataclasses import replace

import condensate_ext
import torch

from tools.scorecard.calls import DTYPES, SELECTORS, qkv, random_sizes
from tools.scorecard.line import Line, Piece, Tally

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def _dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, sum of p |v|, and the largest sum of |q||k| of a row, in float64."""
    group = query.shape[1] // key.shape[1]
    q, k, v = (t.double() for t in (query, *(t.repeat_interleave(group, 1) for t in (key, value))))
    scale = q.shape[-1] ** -0.5
    scores = scale * q @ k.mT
    size = scale * (q.abs() @ k.abs().mT).amax(-1, keepdim=True)
    if causal:
        lq, lk = scores.shape[-2:]
        later = torch.ones(lq, lk, dtype=torch.bool, device=q.device).triu(lk - lq + 1)
        scores = scores.masked_fill(later, -torch.inf)
    weights = scores.softmax(-1).nan_to_num()  # a row without keys
    return weights @ v, weights @ v.abs(), size


def run(piece: Piece) -> Tally:
    tally, rng, generator = Tally(), piece.rng(), piece.generator()
    for dtype in DTYPES:
        for selector in SELECTORS:
            sizes = replace(random_sizes(rng, 500), dtype=dtype, selector=selector)
            tensors = qkv(sizes, piece.device, generator)
            expected, size, scored = _dense(*tensors, sizes.causal)
            u, eps, keys = UNIT[dtype], 2.0**-24, sizes.kv_len
            accumulated = 2 * (sizes.head_dim + 4) * eps * scored + (keys + 16) * eps
            bound = u * (size + expected.abs()) * (1 + 2 * u) + accumulated * size
            budget = -(-keys // 64) * 64
            for name in ("attention", "attention_forward"):
                out = getattr(condensate_ext, name)(
                    *tensors, topk=budget, window=0, anchors=0, selector=selector,
                    causal=sizes.causal,
                )  # fmt: skip
                out, *rest = out if isinstance(out, tuple) else (out,)
                good = bool(((out.double() - expected).abs() <= bound).all())
                good = good and (not rest or not rest[1].any())
                tally.check(good, f"{name} {selector} {sizes}")
    return tally


LINE = Line(
    "dense equivalence",
    "calls",
    "within the bound",
    {"reduced": 2, "full": 40},
    run,
    why="`topk` at least the context, for every dtype and selector, against dense attention in "
    "float64; the estimate of the omitted mass is 0.",
)
