"""The operators have no derivative, in reverse or forward mode: asking for one fails at the call,
never silently."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from condensate_ext._fake import FAKES

_library = torch.library.Library("condensate", "IMPL")


def _any_tangent(values: Iterable[Any]) -> bool:
    """Does a tensor carry a tangent (a dual tensor, torch.func.jvp)?"""
    level = forward_ad._current_level
    return level >= 0 and any(
        forward_ad.unpack_dual(value, level=level).tangent is not None
        for value in values
        if isinstance(value, Tensor)
    )


def _forward_only(op: torch._ops.OpOverload) -> Callable[..., Any]:
    name = op._opname

    def kernel(keyset: _C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and _C._any_requires_grad(*args, **kwargs):
            raise RuntimeError(
                f"condensate_ext.{name} is forward-only, but an input requires grad; call it "
                "under torch.no_grad(), or pass .detach()ed tensors."
            )
        if _any_tangent(args):
            raise RuntimeError(
                f"condensate_ext.{name} has no forward-mode derivative, but an input carries a "
                "tangent; call it outside torch.func.jvp and jacfwd, or pass the primal alone."
            )
        with _C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _C._after_autograd_keyset, *args, **kwargs)

    return kernel


def register() -> None:
    """Gives every operator its autograd rule; called once, when the package is imported."""
    for name in FAKES:
        op = getattr(torch.ops.condensate, name).default
        _library.impl(name, _forward_only(op), "Autograd", with_keyset=True)
