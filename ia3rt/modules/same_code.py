"""Functions are known by what they compile to, wherever they stand and whatever they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def compiles_to(function: object, expected: Callable[..., Any]) -> bool:
    """Whether a function does, step by step and by name, what `expected` does, which is written out for that."""
    code, known = getattr(function, "__code__", None), expected.__code__
    return code is not None and (code.co_code, code.co_names) == (known.co_code, known.co_names)
