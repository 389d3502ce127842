"""Functions are known by what they compile to, wherever they stand and whatever they are called."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any


def same_code(function: object, expected: Callable[..., Any]) -> bool:
    """Whether a function does, step by step, what `expected` does, which is written out for that.

    What it is given, what it looks up and its constants are the same; what its arguments and variables are called, its
    docstring and its annotations may be others.
    """
    if not isinstance(function, FunctionType) or not isinstance(expected, FunctionType):
        return False
    defaults = [(each.__defaults__, each.__kwdefaults__) for each in (function, expected)]
    return defaults[0] == defaults[1] and _steps(function.__code__) == _steps(expected.__code__)


def same_function(function: object, expected: Callable[..., Any]) -> bool:
    """`same_code`, and it can be called in the same ways: its arguments have the same names."""
    return same_code(function, expected) and _arguments(function) == _arguments(expected)


@functools.lru_cache(4096)
def _steps(code: CodeType) -> tuple[Any, ...]:
    rest = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    steps = ((each.opname, each.arg if "_FAST" in each.opname else each.argval) for each in dis.get_instructions(code))
    return (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, rest, *steps)


def _arguments(function: Any) -> tuple[str, ...]:
    code = function.__code__
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    return tuple(code.co_varnames[:count])
