"""The ops as torch sees them: a matrix of ops and features."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tools.scorecard.calls import OPS, Arguments, Op, Sizes, same, tensors_of
from tools.scorecard.line import Line, Piece, Tally

SIZES = Sizes(batch=2, query_len=70, kv_len=400, topk=128)
LIKE_TENSORS = ("query", "key", "value", "summaries", "out_a", "out_b")


def _raw(op: Op) -> Any:
    return getattr(torch.ops.condensate, op.name).default


def _numbered(arguments: Arguments) -> Arguments:
    """As the raw op takes them: selectors by number."""
    from condensate_ext._selectors import SELECTORS

    changed = dict(arguments)
    if "selector" in changed:
        changed["selector"] = SELECTORS[changed["selector"]]
    return changed


def _opcheck(op: Op, arguments: Arguments, device: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = torch.library.opcheck(_raw(op), (), _numbered(arguments))
    return set(results.values()) == {"SUCCESS"}


def _split(arguments: Arguments) -> tuple[list[Tensor], Callable[[tuple[Tensor, ...]], Arguments]]:
    names = list(tensors_of(arguments))
    return [arguments[name] for name in names], lambda tensors: {
        **arguments,
        **dict(zip(names, tensors, strict=True)),
    }


def _compile(op: Op, arguments: Arguments, device: str) -> bool:
    tensors, filled = _split(arguments)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *given: op(filled(given)), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    return same(compiled(*tensors), op(arguments))


def _export(op: Op, arguments: Arguments, device: str) -> bool:
    tensors, filled = _split(arguments)

    class Module(torch.nn.Module):
        def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
            return op(filled(given))

    program = torch.export.export(Module(), tuple(tensors))
    return same(tuple(program.module()(*tensors)), op(arguments))


def _autocast(op: Op, arguments: Arguments, device: str) -> bool:
    def cast(value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.bfloat16()
        return value

    with torch.autocast(device, dtype=torch.bfloat16):
        under = op(arguments)
    if op.name == "merge_states":
        return same(under, op(arguments))
    lowered = {n: cast(v) if n in LIKE_TENSORS else v for n, v in arguments.items()}
    return same(under, op(lowered))


def _vmap(op: Op, arguments: Arguments, device: str) -> bool:
    tensors, filled = _split(arguments)
    stacked = [torch.stack([t, t.flip(0)]) for t in tensors]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapped = torch.func.vmap(lambda *given: op(filled(given)))(*stacked)
    singly = [op(filled(tuple(t[i] for t in stacked))) for i in range(2)]
    return same(mapped, tuple(torch.stack(pair) for pair in zip(*singly, strict=True)))


def _refuses(op: Op, arguments: Arguments, transform: Callable[..., Any]) -> bool:
    for name, tensor in tensors_of(arguments).items():
        if not tensor.is_floating_point():
            continue

        def call(tracked: Tensor, name: str = name) -> Tensor:
            return op({**arguments, name: tracked})[0]

        try:
            transform(call, tensor)
        except RuntimeError as error:
            if op.name not in str(error):
                return False
            continue
        return False
    return True


def _backward(op: Op, arguments: Arguments, device: str) -> bool:
    return _refuses(op, arguments, lambda call, t: call(t.detach().clone().requires_grad_()))


def _forward_ad(op: Op, arguments: Arguments, device: str) -> bool:
    return _refuses(op, arguments, lambda call, t: torch.func.jvp(call, (t,), (t,)))


def _functorch_grad(op: Op, arguments: Arguments, device: str) -> bool:
    return _refuses(
        op, arguments, lambda call, t: torch.func.grad(lambda x: call(x).float().sum())(t)
    )


def _fake(op: Op, arguments: Arguments, device: str) -> bool:
    real = op(arguments)
    with FakeTensorMode() as mode:
        faked = {
            n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in arguments.items()
        }
        fake = op(faked)
    facts = [[(t.shape, t.dtype, t.stride(), t.device.type) for t in ts] for ts in (real, fake)]
    return facts[0] == facts[1]


def _meta(op: Op, arguments: Arguments, device: str) -> bool:
    shapes = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in arguments.items()}
    return [t.shape for t in op(shapes)] == [t.shape for t in op(arguments)]


def _inference(op: Op, arguments: Arguments, device: str) -> bool:
    with torch.inference_mode():
        inside = op(arguments)
    return same(tuple(t.clone() for t in inside), op(arguments))


FEATURES = {
    "opcheck": _opcheck, "compile": _compile, "export": _export, "autocast": _autocast,
    "vmap": _vmap, "backward refused": _backward, "forward AD refused": _forward_ad,
    "functorch grad refused": _functorch_grad, "fake mode": _fake, "meta": _meta,
    "inference mode": _inference,
}  # fmt: skip


def run(piece: Piece) -> Tally:
    """One feature over all ops."""
    tally = Tally()
    name, works = list(FEATURES.items())[piece.index]
    for op in OPS:
        arguments = op.make(SIZES, piece.device, piece.generator())
        try:
            tally.check(works(op, arguments, piece.device), f"{op.name}, {name}")
        except Exception as error:
            tally.check(False, f"{op.name}, {name}: {type(error).__name__}: {error}")
    return tally


LINE = Line(
    "torch features",
    "ops x features",
    "all",
    {"reduced": len(FEATURES), "full": len(FEATURES)},
    run,
    why="Each op under " + ", ".join(FEATURES) + ".",
)
