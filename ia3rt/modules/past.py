"""Callers that read a layer's weight past the layer, where no vector of it would act."""

from __future__ import annotations

import dis
import functools
from collections.abc import Hashable, Iterable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ia3rt.modules.set_forward import keeps_class_forward

_READ = ("weight", "bias", "qweight")
_MAKING = ("__init__", "_init_weights", "reset_parameters", "_reset_parameters")


def is_only_read(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Whether the parent's code reads the weight of the layer at `path` and never calls it: nn.MultiheadAttention does.

    Known by what its methods compile to: each place that names the layer goes on to its weight or bias. One that hands
    the layer to something else, or calls it anywhere, may call it.
    """
    parent, _, name = path.rpartition(".")
    return is_only_read_by(modules[parent], name) if path else False


def is_only_read_by(parent: nn.Module, name: str) -> bool:
    """The same of a child, by what `parent` runs now: a forward that other code set on it, or its class's methods."""
    function: object = vars(parent).get("forward")
    while isinstance(function, (MethodType, functools.partial)):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    if isinstance(function, FunctionType) and not keeps_class_forward(parent):
        return _all_read(list(_after(function.__code__, name)))
    cls: Hashable = type(parent)  # type: ignore[assignment]
    return _is_only_read(cls, name)


@functools.lru_cache(4096)
def _is_only_read(cls: Hashable, name: str) -> bool:
    return _all_read([found for function in _methods(cls) for found in _after(function.__code__, name)])


def _all_read(found: list[str | None]) -> bool:
    return bool(found) and all(attribute in _READ for attribute in found)


def _methods(cls: Any) -> Iterator[FunctionType]:
    """What the instances of a class may run: its methods, and of those that it overrides the ones that they call."""
    hidden = {*_MAKING, *vars(nn.Module)} - {"forward"}
    for base in cls.__mro__:
        for method, function in vars(base).items():
            if isinstance(function, FunctionType) and method not in hidden and base is not nn.Module:
                yield function
                if "super" not in function.__code__.co_names:
                    hidden.add(method)


def _after(code: CodeType, name: str) -> Iterator[str | None]:
    """For each place in code that loads the attribute `name`: the attribute of it that is loaded then, if one is."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG")]
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval == name:
            goes_on = following is not None and following.opname in ("LOAD_ATTR", "LOAD_METHOD")
            yield following.argval if following is not None and goes_on else None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _after(constant, name)


def call_layers(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> list[RemovableHandle]:
    """Lets torch's encoder layers around the layers at `paths` call them; gives what takes that back.

    Without gradients, nn.TransformerEncoderLayer hands all its weights to one operation, unless a hook is on any module
    in it: then somebody wants to see the calls, as we do.
    """
    around = {path.rpartition(".")[0]: None for path in paths}
    encoders = [modules[path] for path in around if isinstance(modules[path], nn.TransformerEncoderLayer)]
    return [each.register_forward_pre_hook(_sees) for each in encoders if _sees not in each._forward_pre_hooks.values()]


def _sees(module: nn.Module, args: object) -> None:
    """Nothing: that it is there is enough."""
