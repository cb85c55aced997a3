"""The operators have no backward: asking for one fails at the forward call, never silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _C

from condensate_ext._fake import FAKES

_library = torch.library.Library("condensate", "IMPL")


def _forward_only(op: torch._ops.OpOverload) -> Callable[..., Any]:
    name = op._opname

    def kernel(keyset: _C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and _C._any_requires_grad(*args, **kwargs):
            raise RuntimeError(
                f"condensate_ext.{name} is forward-only, but an input requires grad; call it "
                "under torch.no_grad(), or pass .detach()ed tensors."
            )
        with _C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _C._after_autograd_keyset, *args, **kwargs)

    return kernel


def register() -> None:
    """Gives every operator its autograd rule; called once, when the package is imported."""
    for name in FAKES:
        op = getattr(torch.ops.condensate, name).default
        _library.impl(name, _forward_only(op), "Autograd", with_keyset=True)
