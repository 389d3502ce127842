"""Lets state that outlives a call be made inside torch.inference_mode(), FakeTensorMode and the like, and jit.trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
R = TypeVar("R")

_modes = torch._C._len_torch_dispatch_stack
_recorder = torch._C._get_tracing_state
_set_recorder = torch._C._set_tracing_state  # type: ignore[attr-defined]
_is_inference = torch.is_inference_mode_enabled

# Proxies may see operations before autograd does, as make_fx(pre_dispatch=True) has them: in a stack apart.
_is_included, _BEFORE_DISPATCH = torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch


def outside_modes(function: Callable[P, R]) -> Callable[P, R]:
    """Runs `function` outside of inference mode, and of what sees each operation: modes, and torch.jit.trace.

    A tensor made in inference mode could never be written to outside of it, one made in FakeTensorMode has no numbers
    at all, and what a trace saw being written it would write again, whenever it runs. Where nothing is on, as when
    adapters are switched by the microsecond, the call costs nothing more.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        recorder = _recorder()
        if recorder is not None:
            _set_recorder(None)
            try:
                return run(*args, **kwargs)
            finally:
                _set_recorder(recorder)
        if _modes() or _is_included(_BEFORE_DISPATCH):
            with _disable_current_modes():
                return run(*args, **kwargs)
        if not _is_inference():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run
