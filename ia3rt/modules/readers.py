"""Callers that read a layer's weight past the layer, where no vector of it would act."""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from types import CodeType, FunctionType, MethodType
from typing import Any, Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from ia3rt.modules.set_forward import keeps_class_forward

_READ = ("weight", "bias", "qweight")
LOOKED_AT = ("dtype", "device", "shape", "size", "ndim", "dim", "numel", "is_cuda", "requires_grad", "is_meta")
_METHODS = FunctionType, property, classmethod, staticmethod, functools.partial
_MAKING = ("__init__", "_init_weights", "init_weights", "reset_parameters", "_reset_parameters")


def reader_of(modules: Mapping[str, nn.Module], path: str) -> nn.Module | None:
    """The module around the layer at `path` that reads its weight and never calls it, as nn.MultiheadAttention does.

    Known by what methods compile to: the forward, or a method that it calls, goes from the layer's name on to its
    weight, and none uses the layer otherwise. One that hands it to something else, or calls it anywhere, may call it.
    """
    parts = path.split(".") if path else []
    for depth, name in enumerate(parts):
        around = modules[".".join(parts[:depth])]
        if is_only_read(around, name):
            return around
    return None


def is_only_read(module: nn.Module, name: str) -> bool:
    """Whether that is so of a child, by what `module` runs now: a forward set on it, or its class's methods."""
    function: object = vars(module).get("forward")
    while isinstance(function, (MethodType, functools.partial)):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    if isinstance(function, FunctionType) and not keeps_class_forward(module):
        return _only_reads([function], [function], name)
    cls: Any = type(module)
    held = (value for base in cls.__mro__ if base is not nn.Module for value in vars(base).values())
    return _class_only_reads(cls, name, tuple(value for value in held if isinstance(value, _METHODS)))


@functools.lru_cache(4096)
def _class_only_reads(cls: Any, name: str, _: tuple[object, ...]) -> bool:
    """Known again by the class's methods too: other code may put others there."""
    methods = _methods(cls)
    run, found = set[str](), ["forward"]
    while found:
        method = found.pop()
        run.add(method)
        named = {called for function in methods.get(method, ()) for called in _names(function.__code__)}
        found += (named & methods.keys()) - run
    forward = [function for method in run for function in methods.get(method, ())]
    return _only_reads(forward, [function for each in methods.values() for function in each], name)


def _only_reads(forward: Iterable[FunctionType], methods: Iterable[FunctionType], name: str) -> bool:
    """Whether `forward` reads the weight of the child `name`, and none of the methods does more with it."""
    if not any(_kind(chain) == "read" for function in forward for chain in _chains(function.__code__, name)):
        return False
    return all(_kind(chain) != "used" for function in methods for chain in _chains(function.__code__, name))


def _kind(chain: Sequence[str]) -> Literal["used", "read", "looked at"]:
    """What is done with a child, by the attributes that are loaded of it, one of the other."""
    read = next((place for place, attribute in enumerate(chain) if attribute in _READ), None)
    if read is None:
        return "used"
    return "looked at" if chain[read + 1 : read + 2] and chain[read + 1] in LOOKED_AT else "read"


def _methods(cls: Any) -> dict[str, list[FunctionType]]:
    """By name, what the instances of a class may run: its methods, and those that they override and call."""
    found: dict[str, list[FunctionType]] = {}
    hidden = {*_MAKING, *vars(nn.Module)} - {"forward"}
    for base in cls.__mro__:
        for method, value in vars(base).items() if base is not nn.Module else ():
            functions = [] if method in hidden else _functions(value)
            found.setdefault(method, []).extend(functions)
            if functions and not any("super" in _names(function.__code__) for function in functions):
                hidden.add(method)
    return found


def _functions(value: object) -> list[FunctionType]:
    """A method's functions: itself, and what its decorators hold."""
    functions: list[FunctionType] = []
    found = [value.fget if isinstance(value, property) else value]
    while found:
        each = found.pop()
        each = getattr(each, "__func__", each)
        if isinstance(each, FunctionType) and each not in functions:
            functions.append(each)
            for cell in each.__closure__ or ():
                with suppress(ValueError):  # a variable that has no value yet
                    found.append(cell.cell_contents)
    return functions


def _names(code: CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _chains(code: CodeType, name: str) -> Iterator[list[str]]:
    """For each place in code that loads the attribute `name`: what is loaded of it, one of the other."""
    if name in code.co_names:
        steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG")]
        loads = [step.argval if step.opname in ("LOAD_ATTR", "LOAD_METHOD") else "" for step in steps]
        for place, loaded in enumerate(loads):
            if loaded == name:
                yield list(takewhile(bool, loads[place + 1 :]))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _chains(constant, name)


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
