"""Arguments of a kind that no operator takes: refused as ValueError, not in torch's own words.

`checked` looks at what the Python functions get, before torch converts it (None to False, a bool to
an int). Tensors that are not plain ones (sparse, nested, quantised) reach a kernel that refuses
them, whoever calls the operator.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor

from condensate_ext._checks import fail
from condensate_ext._fake import FAKES

P = ParamSpec("P")
R = TypeVar("R")


class _Kind(NamedTuple):
    """What an annotation stands for; `exact` are the types that most calls pass."""

    exact: frozenset[type]
    wider: tuple[type, ...]
    expected: str


_NONE = type(None)
_COUNT = _Kind(frozenset({int}), (int, torch.SymInt), "an int")
_FLAG = _Kind(frozenset({bool}), (), "True or False")
_NUMBER = _Kind(frozenset({float, int, _NONE}), (float, int, torch.SymFloat), "a number or None")
_TENSOR = _Kind(frozenset({Tensor}), (Tensor,), "a torch.Tensor")
_KINDS = {
    "Tensor": _TENSOR,
    "Tensor | None": _TENSOR._replace(
        exact=frozenset({Tensor, _NONE}), expected="a torch.Tensor or None"
    ),
    "int": _COUNT,
    "int | None": _COUNT._replace(exact=frozenset({int, _NONE}), expected="an int or None"),
    "bool": _FLAG,
    "bool | None": _FLAG._replace(exact=frozenset({bool, _NONE}), expected="True, False or None"),
    "float | None": _NUMBER,
}


# By what sets a tensor apart: the words for it, and what makes a plain tensor of it.
_SPARSE = ("is sparse", "call .to_dense() first")
_NESTED = ("is nested", "pad it to one length, or call the operator for each sequence")
_QUANTISED = ("is quantized", "call .dequantize() first")
_OPAQUE = ("is in a layout of a library", "call .to_dense() first")


def _oddity(tensor: Tensor) -> tuple[str, str] | None:
    """Why a tensor is no plain one, and the fix."""
    if tensor.is_nested:
        return _NESTED
    if tensor.is_quantized:
        return _QUANTISED
    if tensor.layout is torch.strided:
        return None
    return _OPAQUE if tensor.is_mkldnn else _SPARSE


def _refuse_odd(op: str, name: str, value: Any) -> None:
    odd = _oddity(value) if isinstance(value, Tensor) else None
    if odd is not None:
        fail(op, f"{name} {odd[0]}, expected a plain strided tensor; {odd[1]}.")


def _refuse_type(op: str, name: str, value: Any, kind: _Kind) -> NoReturn:
    shown = f"{value!r} of type " if isinstance(value, (bool, int, float, str)) else "of type "
    fix = "call .item() on it" if isinstance(value, Tensor) else "convert it first"
    if value is None:
        fix = "leave it out for its default" if kind is not _TENSOR else "pass one"
    fail(op, f"{name} is {shown}{type(value).__name__}, expected {kind.expected}; {fix}.")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Refuses arguments that are not of the annotated type."""
    op = function.__name__
    parameters = inspect.signature(function).parameters.values()
    kinds = {p.name: _KINDS[p.annotation] for p in parameters if p.annotation in _KINDS}
    in_order = tuple(kinds.items())

    def look_closer(name: str, value: Any, kind: _Kind) -> None:
        if isinstance(value, bool) or not isinstance(value, kind.wider):
            _refuse_type(op, name, value, kind)
        _refuse_odd(op, name, value)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for (name, kind), value in zip(in_order, args, strict=False):
            if type(value) not in kind.exact:
                look_closer(name, value, kind)
        for name, value in kwargs.items():
            if name in kinds and type(value) not in kinds[name].exact:
                look_closer(name, value, kinds[name])
        try:
            return function(*args, **kwargs)
        except RuntimeError:
            for name, value in kwargs.items():
                if type(value) is int and not -(2**63) <= value < 2**63:  # torch's limit
                    fail(op, f"{name} is {value}, expected an int of 64 bits; pass a smaller one.")
            raise

    return call


_REFUSED_KEYS = [
    f"{kind}{device}"
    for kind in ("Sparse", "SparseCsr", "NestedTensor", "Quantized")
    for device in ("CPU", "CUDA")
] + ["MkldnnCPU"]


def _refusing(op: torch._ops.OpOverload) -> Callable[..., NoReturn]:
    names = [argument.name for argument in op._schema.arguments]

    def kernel(*args: Any, **kwargs: Any) -> NoReturn:
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            _refuse_odd(op._opname, name, value)
        raise RuntimeError(f"{op._opname} takes plain strided tensors only")

    return kernel


_library = torch.library.Library("condensate", "IMPL")


def register() -> None:
    """Gives every operator its refusal of tensors that are not plain; called once, at import."""
    for name in FAKES:
        refusing = _refusing(getattr(torch.ops.condensate, name).default)
        for key in _REFUSED_KEYS:
            _library.impl(name, refusing, key)
