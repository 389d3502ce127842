"""Lets state that outlives a call be made inside torch.inference_mode(), and inside a mode such as FakeTensorMode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
R = TypeVar("R")

_modes = torch._C._len_torch_dispatch_stack


def outside_modes(function: Callable[P, R]) -> Callable[P, R]:
    """Runs `function` outside of inference mode and of modes that see each operation.

    A tensor made in inference mode could never be written to outside of it, and one made in FakeTensorMode has no
    numbers at all. Where no mode is on, as when adapters are switched by the microsecond, the call costs nothing more.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if _modes():
            with _disable_current_modes():
                return run(*args, **kwargs)
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run
