"""Forwards that other code sets on a module: whether they lead on to its class's, where a drop-in wears its vector."""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

_MOST = 100  # objects to look through behind one forward
_PARALLEL = "transformers.distributed.tensor_parallel"


def keeps_class_forward(module: nn.Module) -> bool:
    """Whether the class's forward runs, also once the class is another.

    So it is with accelerate's hooks and with transformers' tensor parallelism, which call what they replaced, and where
    hooks were removed, which put it back.
    """
    held = vars(module)
    if "forward" not in held:
        return True
    return (
        is_class_forward(held["forward"], module)
        or is_class_forward(held.get("_old_forward"), module)
        or cell_of_class_forward(module) is not None
    )


def parallel_style(module: nn.Module) -> object | None:
    """How transformers' tensor parallelism has the module's forward compute; None where it has set none on it."""
    cell = _variables(module).get("self")
    return None if cell is None else cell.cell_contents


def cell_of_class_forward(module: nn.Module) -> CellType | None:
    """Where the forward that splits a linear layer as transformers does keeps the one that it calls, its class's.

    None where no such forward is set on the module, or it calls another. Those are known that split a layer's outputs,
    or its inputs, and do nothing else between its class's forward and its weight.
    """
    known: Any = sys.modules.get(_PARALLEL)
    cell = _variables(module).get("original_forward")
    if cell is None or type(parallel_style(module)) not in (known.ColwiseParallel, known.RowwiseParallel):
        return None
    return cell if is_class_forward(cell.cell_contents, module) else None


def _variables(module: nn.Module) -> dict[str, CellType]:
    """The variables around the forward that transformers' tensor parallelism set on a module; none of any other's."""
    function = vars(module).get("forward")
    if not isinstance(function, FunctionType) or function.__module__ != _PARALLEL or _PARALLEL not in sys.modules:
        return {}
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))


def is_class_forward(function: object, module: nn.Module) -> bool:
    """Whether `function` is the forward of the module's class, bound to the module."""
    return (
        isinstance(function, MethodType) and function.__self__ is module and function.__func__ is type(module).forward
    )


def is_reached(module: nn.Module) -> bool:
    """Whether the class's forward runs when the module is called, as far as can be seen."""
    return "forward" not in vars(module) or leads_on(module)


def leads_on(module: nn.Module) -> bool:
    """Whether the forward set on `module` holds its class's, as a decorator or a hook does that calls it.

    What it holds are the variables and attributes that its code names. So a forward that only computes the same does
    not lead on, although the module may keep the replaced one somewhere, to be put back.
    """
    seen: dict[int, object] = {}
    found = deque([vars(module).get("forward")])
    while found and len(seen) < _MOST:
        each = found.popleft()
        if is_class_forward(each, module) or each is type(module).forward:
            return True
        if id(each) not in seen:
            seen[id(each)] = each  # kept, so that no other object comes to have its id
            found.extend(_held(each, module))
    return False


def _held(each: object, module: nn.Module) -> Iterator[object]:
    """What a callable may call, as far as can be seen."""
    if isinstance(each, MethodType):
        yield each.__func__
        if each.__self__ is not module:
            yield each.__self__
    elif isinstance(each, functools.partial):
        yield from (each.func, *each.args, *each.keywords.values())
    elif isinstance(each, FunctionType):
        for name in _names(each.__code__):
            yield from (held[name] for held in (each.__globals__, vars(module)) if name in held)
        for cell in each.__closure__ or ():
            with suppress(ValueError):  # a variable that has no value yet
                yield cell.cell_contents
        yield from (*(each.__defaults__ or ()), *(each.__kwdefaults__ or {}).values())
    elif hasattr(each, "__dict__") and not isinstance(each, (nn.Module, Tensor, type)) and callable(each):
        yield from (*vars(each).values(), getattr(type(each), "__call__", None))  # noqa: B004


def _names(code: CodeType) -> Iterator[str]:
    """The global variables and attributes that code names, and functions made in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
