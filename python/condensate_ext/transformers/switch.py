"""Turns condensate attention on and off, for one model and, in a context, for one thread."""

from __future__ import annotations

import copy
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import Cache

from condensate_ext.transformers.attend import attend, explain
from condensate_ext.transformers.cache import keep_summaries
from condensate_ext.transformers.computes import Compute, Condensed, Dense, Replaced
from condensate_ext.transformers.masks import describe_mask
from condensate_ext.transformers.policy import Policy
from condensate_ext.transformers.refusals import refusal_of

IMPLEMENTATION = "condensate"
Layers = Mapping[int, Mapping[str, Any] | None]
_numbers = itertools.count()
_lock = threading.RLock()
_DEFAULT = Condensed(Policy())  # of a model loaded with attn_implementation="condensate"
_switches: dict[int, weakref.ref[Switch]] = {}  # by the id of a config that its switch keeps alive


@dataclass(frozen=True)
class _Entry:
    """A context that is open in this thread."""

    number: int
    switch: Switch
    compute: Compute


_entered: ContextVar[tuple[_Entry, ...]] = ContextVar("condensate_entered", default=())


class Switch:
    """What a model's attention runs. Its attention modules hold it, and its configs lead to it."""

    def __init__(
        self, configs: list[Any], before: list[str], enabled: Compute | None = None
    ) -> None:
        self.configs = configs
        self.before = before  # implementation of each config without this switch
        self.enabled = enabled
        self.open: tuple[_Entry, ...] = ()  # contexts of all threads
        for config in configs:
            _switches[id(config)] = weakref.ref(self)
            weakref.finalize(self, _switches.pop, id(config), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Switch:
        """A copied model is a model of its own: enabled if this one is, in no context."""
        twin = memo[id(self)] = Switch(
            copy.deepcopy(self.configs, memo), list(self.before), self.enabled
        )
        twin.apply()
        return twin

    def __reduce__(self) -> Any:
        return Switch, (self.configs, self.before, self.enabled)

    def compute(self) -> Compute | None:
        """What this thread runs; None: the implementation from before."""
        if self.open:
            if torch.compiler.is_compiling():  # which cannot trace a ContextVar
                return self.open[-1].compute
            for entry in reversed(_entered.get()):
                if entry.switch is self:
                    return entry.compute
        return self.enabled

    def apply(self) -> None:
        """Sets the implementation that the configs name."""
        on = self.enabled is not None or bool(self.open)
        for config, before in zip(self.configs, self.before, strict=True):
            config._attn_implementation_internal = IMPLEMENTATION if on else before

    def implementation_before(self, config: Any) -> str:
        """The implementation without this switch."""
        own = [b for c, b in zip(self.configs, self.before, strict=True) if c is config]
        return own[0] if own else self.before[0]


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """The function that transformers calls in every layer."""
    switch: Switch | None = module.__dict__.get("_condensate")
    compute = _DEFAULT if switch is None else switch.compute()
    if switch is None:
        _watch_cache(module)  # so that the next step finds summaries
    if compute is None:
        before = switch.implementation_before(getattr(module, "config", None))  # type: ignore[union-attr]
        function = AttentionInterface._global_mapping.get(before) or _eager(module, before)
        dense: tuple[Tensor, Any] = function(module, query, key, value, attention_mask, **kwargs)
        return dense
    compute = compute.of_layer(getattr(module, "layer_idx", 0))
    try:
        out = attend(compute, module, query, key, value, attention_mask, **kwargs)
    except NotImplementedError:
        raise  # names the layer already
    except (ValueError, RuntimeError) as error:
        raise explain(error, module) from None
    return out.transpose(1, 2).contiguous(), None  # transformers wants [B, L, H, D]


def _eager(module: torch.nn.Module, name: str) -> Callable[..., Any]:
    home = sys.modules[type(module).__module__]
    if name != "eager" or not hasattr(home, "eager_attention_forward"):
        raise RuntimeError(
            f"{type(module).__name__} ran attention {name!r} before, which cannot be called while "
            "another thread has condensed_attention open; load the model with "
            "attn_implementation='sdpa'."
        )
    function: Callable[..., Any] = home.eager_attention_forward
    return function


def _mask(*, config: Any = None, **kwargs: Any) -> Tensor | None:
    """The function that transformers asks for a mask."""
    reference = _switches.get(id(config))
    switch = None if reference is None else reference()
    if switch is None or switch.compute() is not None:
        return describe_mask(**kwargs)
    before = switch.implementation_before(config)
    make = AttentionMaskInterface._global_mapping.get(before)
    mask: Tensor | None = None if make is None else make(config=config, **kwargs)
    return mask


def register() -> None:
    """Lets ``attn_implementation="condensate"`` be said to transformers."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def _attentions(model: Any) -> list[torch.nn.Module]:
    return [
        module
        for module in model.modules()
        if "Attention" in type(module).__name__
        and isinstance(getattr(module, "layer_idx", None), int)
    ]


def _swap_layer(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for given in (*kwargs.values(), *args):
        if isinstance(given, Cache):
            keep_summaries(given, module.layer_idx)  # type: ignore[arg-type]


def _watch_cache(module: torch.nn.Module) -> None:
    if "_condensate_watch" not in module.__dict__ and not torch.compiler.is_compiling():
        module._condensate_watch = module.register_forward_pre_hook(  # type: ignore[assignment]
            _swap_layer, with_kwargs=True
        )


def _unwatch(module: torch.nn.Module) -> None:
    if handle := module.__dict__.pop("_condensate_watch", None):
        handle.remove()


def _switch_of(model: Any) -> Switch:
    """The model's switch, made where it has none yet."""
    modules = _attentions(model)
    if modules and "_condensate" in modules[0].__dict__:
        return modules[0].__dict__["_condensate"]  # type: ignore[no-any-return]
    if reason := refusal_of(model.config):
        raise NotImplementedError(f"{type(model).__name__} cannot be condensed: {reason}")
    if not model._can_set_attn_implementation() or not modules:
        raise RuntimeError(
            f"{type(model).__name__} does not use transformers' AttentionInterface, so its "
            "attention cannot be replaced; use a model that does."
        )
    configs = _own_configs(model, modules)
    before = [config._attn_implementation_internal for config in configs]
    loaded_so = IMPLEMENTATION in before
    dense = ["sdpa" if name == IMPLEMENTATION else name for name in before]
    switch = Switch(configs, dense, _DEFAULT if loaded_so else None)
    for module in modules:
        module._condensate = switch  # type: ignore[assignment]
    return switch


def _own_configs(model: Any, attentions: list[torch.nn.Module]) -> list[Any]:
    """Gives the model configs that no other model shares; returns those of ``attentions``."""
    twins: dict[int, Any] = {}
    copy.deepcopy(model.config, twins)
    for module in model.modules():
        for name, held in list(module.__dict__.items()):
            if isinstance(held, PreTrainedConfig) and id(held) in twins:
                module.__dict__[name] = twins[id(held)]
    own = {id(config): config for m in attentions if (config := getattr(m, "config", None))}
    return list(own.values()) or [model.config]


def _compute_of(
    function: str, model: Any, layers: Layers | None, policy: dict[str, Any]
) -> Compute:
    """What a call of ``function`` asks for."""
    own: dict[int, Compute] = {}
    known: set[Any] = {module.layer_idx for module in _attentions(model)}
    for index, changed in (layers or {}).items():
        if index not in known:
            raise ValueError(
                f"{function}: layers names layer {index!r}, expected one of "
                f"{min(known, default=0)} to {max(known, default=0)}; leave it out."
            )
        own[index] = (
            Dense() if changed is None else Condensed(Policy.of(function, {**policy, **changed}))
        )
    return Condensed(Policy.of(function, policy), own)


def enable(model: Any, *, layers: Layers | None = None, **policy: Any) -> None:
    """Lets every full-attention layer of ``model`` run condensate attention from now on.

    Prompts run :func:`condensate_ext.attention`, decoding steps of up to 16 tokens
    :func:`condensate_ext.attention_with_kvcache` over the model's own cache. Layers of a sliding
    window or of chunks stay exact. A cache that was filled densely may be continued, and the other
    way round. Calling it again changes the policy.

    >>> enable(model, topk=1024, layers={0: None, 1: {"topk": 2048}})   # doctest: +SKIP
    >>> model.generate(input_ids, max_new_tokens=64)                    # doctest: +SKIP

    Args:
        model: a transformers decoder-only model in eval mode.
        layers: what some layers run instead, by their index: arguments that differ from ``policy``,
            or None for dense attention.
        policy: see :class:`Policy`.

    Raises:
        TypeError: an argument of the policy is unknown, or the model sets it.
        ValueError: a value of the policy is not allowed, or the model has no such layer.
        NotImplementedError: the model needs what this package has no kernel for.
        RuntimeError: the model does not go through transformers' attention interface.
    """
    compute = _compute_of("enable", model, layers, policy)
    with _lock:
        switch = _switch_of(model)
        switch.enabled = compute
        switch.apply()
    for module in _attentions(model):
        _watch_cache(module)


def disable(model: Any) -> None:
    """Takes :func:`enable` back. A model that is not enabled is left as it is.

    Args:
        model: a transformers model.
    """
    modules = _attentions(model)
    with _lock:
        for module in modules:
            _unwatch(module)
        if modules and "_condensate" in modules[0].__dict__:
            switch = _switch_of(model)
            switch.enabled = None
            switch.apply()


@contextmanager
def open_context(model: Any, compute: Compute) -> Iterator[None]:
    """Lets the passes that this thread makes meanwhile run ``compute``."""
    with _lock:
        switch = _switch_of(model)
        entry = _Entry(next(_numbers), switch, compute)
        switch.open = (*switch.open, entry)
        switch.apply()
    for module in _attentions(model):
        _watch_cache(module)
    _entered.set((*_entered.get(), entry))
    try:
        yield
    finally:
        _entered.set(tuple(e for e in _entered.get() if e is not entry))
        with _lock:
            switch.open = tuple(e for e in switch.open if e is not entry)
            switch.apply()
            if not switch.open and switch.enabled is None:
                for module in _attentions(model):
                    _unwatch(module)


@contextmanager
def condensed_attention(
    model: Any, *, layers: Layers | None = None, **policy: Any
) -> Iterator[None]:
    """:func:`enable` for the passes that this thread makes meanwhile.

    Contexts may be nested, the inner policy holds, and end in any order.

    >>> with torch.no_grad(), condensed_attention(model, topk=1024):   # doctest: +SKIP
    ...     model.generate(input_ids, max_new_tokens=64)

    Args and errors: as for :func:`enable`.
    """
    with open_context(model, _compute_of("condensed_attention", model, layers, policy)):
        yield


@contextmanager
def replaced_attention(model: Any, compute: Callable[..., Tensor]) -> Iterator[None]:
    """Lets every full-attention layer of ``model`` call ``compute`` meanwhile, in layer order.

    Args:
        model: as for :func:`enable`.
        compute: ``compute(query, key, value, *, scale)`` for causal attention; query
            ``[B, Hq, Lq, D]``, key and value ``[B, Hkv, Lk, D]`` with positions encoded, in the
            model's dtype, the last query at the last key; returns ``[B, Hq, Lq, D]``.

    Raises:
        NotImplementedError: the model, or a forward pass, needs what this hook cannot compute.
        RuntimeError: the model does not go through transformers' attention interface.
    """
    with open_context(model, Replaced(compute)):
        yield
