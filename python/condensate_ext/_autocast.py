"""Under torch.autocast the operators take the autocast dtype, as scaled_dot_product_attention does.

Only what is multiplied is cast: log-sum-exps stay float32, and merge_states has nothing to cast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _C, Tensor

_library = torch.library.Library("condensate", "IMPL")

# How many of an operator's leading tensor arguments are cast.
CAST_ARGUMENTS = {
    "attention": 3,
    "attention_forward": 3,
    "block_summaries": 1,
    "select_blocks": 3,
    "select_tokens": 2,
    "block_sparse_attention": 3,
    "omitted_mass": 2,
    # A cache keeps its dtype.
    "attention_with_kvcache": 1,
    "attention_with_kvcache_": 1,
    "select_tokens_with_kvcache": 1,
    "token_sparse_attention_with_kvcache": 1,
}
_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def _cast(value: Any, device_type: str, dtype: torch.dtype) -> Any:
    # The same tensors that torch's own rules cast: floating, of this device, not float64.
    if (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.device.type == device_type
        and value.dtype != torch.float64
    ):
        return value.to(dtype)
    return value


def _casting(op: torch._ops.OpOverload, count: int, device_type: str) -> Callable[..., Any]:
    excluded = _C.DispatchKeySet(getattr(_C.DispatchKey, _KEYS[device_type]))

    def kernel(_keyset: _C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with _C._ExcludeDispatchKeyGuard(excluded):
            cast = [_cast(value, device_type, dtype) for value in args[:count]]
            return op(*cast, *args[count:], **kwargs)

    return kernel


def register() -> None:
    """Gives the operators their autocast rules; called once, when the package is imported."""
    for name, count in CAST_ARGUMENTS.items():
        op = getattr(torch.ops.condensate, name).default
        for device_type, key in _KEYS.items():
            _library.impl(name, _casting(op, count, device_type), key, with_keyset=True)
