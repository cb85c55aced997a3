"""Float64 attention over an explicit support, with the error bound of the correctness policy.

With A = sum p|v|, u the unit roundoff of the dtype, eps = 2^-24, S = the row's largest
scale * sum|q||k| and n attended keys:
    |o - ref|   <= u (A + |ref|) (1 + 2u) + [2 (D + 4) eps S + (n + 16) eps] A
    |lse - ref| <= 4 eps (S + |lse| + 16)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

EPS = 2.0**-24
UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def default_scale(head_dim: int) -> float:
    return head_dim**-0.5


def as_float32(value: float) -> float:
    """The scale that a call means: kernels take it in float32."""
    return float(torch.tensor(value, dtype=torch.float32))


def expand_heads(kv: Tensor, query_heads: int) -> Tensor:
    return kv.double().repeat_interleave(query_heads // kv.shape[1], dim=1)


def scores(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """scale * q.k in float64, [B, Hq, Lq, Lk]."""
    factor = as_float32(default_scale(query.shape[-1]) if scale is None else scale)
    return factor * (query.double() @ expand_heads(key, query.shape[1]).mT)


@dataclass(frozen=True)
class Reference:
    """What float64 says, and how far a kernel may be from it."""

    out: Tensor  # [B, Hq, Lq, D] float64
    lse: Tensor  # [B, Hq, Lq] float64, -inf for an empty support
    out_bound: Tensor
    lse_bound: Tensor
    finite: Tensor  # [B, Hq, Lq, D]: where the result has to be finite


def attention(
    query: Tensor, key: Tensor, value: Tensor, support: Tensor, scale: float | None = None
) -> Reference:
    """Softmax attention over `support` (bool, broadcastable to [B, Hq, Lq, Lk])."""
    heads, head_dim = query.shape[1], query.shape[-1]
    support = support.expand(query.shape[0], heads, query.shape[2], key.shape[2])
    masked = scores(query, key, scale).masked_fill(~support, -torch.inf)
    lse = torch.logsumexp(masked, -1)
    prob = torch.where(support, (masked - lse[..., None]).exp(), 0.0)
    raw_values = expand_heads(value, heads)
    values = raw_values.nan_to_num(0.0, 0.0, 0.0)
    out = prob @ values
    weight = prob @ values.abs()
    size = scores(query.abs(), key.abs(), None if scale is None else abs(scale))
    size = pad(torch.where(support, size, 0.0), (0, 1)).amax(-1)  # the pad: Lk may be 0
    keys = support.sum(-1, keepdim=True).double()
    unit = UNIT_ROUNDOFF[query.dtype]
    accumulate = 2 * (head_dim + 4) * EPS * size[..., None] + (keys + 16) * EPS
    bound = unit * (weight + out.abs()) * (1 + 2 * unit) + accumulate * weight
    touches_nonfinite = support.double() @ (~raw_values.isfinite()).double() > 0
    finite = prob.sum(-1, keepdim=True).isfinite() & ~touches_nonfinite
    lse_bound = 4 * EPS * (size + lse.abs().nan_to_num(posinf=0.0) + 16)
    return Reference(out, lse, bound, lse_bound, finite)


def assert_matches(
    reference: Reference, out: Tensor, lse: Tensor | None = None, hint: str = ""
) -> float:
    """Assert both gates; returns the largest share of the bound that was used."""
    assert out.shape == reference.out.shape, f"out is {tuple(out.shape)} {hint}"
    finite = out.isfinite()
    assert torch.equal(finite, reference.finite), f"finite in other places than the oracle {hint}"
    error = (out.double() - reference.out).abs()
    used = torch.where(finite, error / reference.out_bound.clamp(min=1e-300), 0.0)
    used = torch.where(finite & (error == 0), 0.0, used)
    worst = float(used.max()) if used.numel() else 0.0
    where = tuple(int(x) for x in torch.unravel_index(used.argmax(), used.shape)) if worst else ()
    assert worst <= 1.0, f"out at {where} is off by {worst:.3g} times its bound {hint}"
    if lse is not None:
        _assert_lse(reference, lse, hint)
    return worst


def _assert_lse(reference: Reference, lse: Tensor, hint: str) -> None:
    assert lse.dtype == torch.float32 and lse.shape == reference.lse.shape, hint
    empty = reference.lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty), (
        f"lse is -inf in other rows than the oracle {hint}"
    )
    finite = reference.lse.isfinite()
    assert torch.equal(lse.isfinite(), finite), (
        f"lse is finite in other rows than the oracle {hint}"
    )
    used = ((lse.double() - reference.lse).abs() / reference.lse_bound)[finite]
    worst = float(used.max()) if used.numel() else 0.0
    assert worst <= 1.0, f"lse is off by {worst:.3g} times its bound {hint}"


def omitted_mass(
    query: Tensor, key: Tensor, lse: Tensor, visible: Tensor, scale: float | None = None
) -> Tensor:
    """1 - exp(lse - lse_full) in float64, 0 where no key is visible, clamped to [0, 1]."""
    full = torch.logsumexp(scores(query, key, scale).masked_fill(~visible, -torch.inf), -1)
    omitted = 1 - (lse.double() - full).exp()
    return torch.where(full == -torch.inf, 0.0, omitted).clamp(0, 1)
