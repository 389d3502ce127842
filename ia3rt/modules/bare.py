"""Calling a module without nn.Module's hop, where nothing hangs on it: a tenth of a small layer's time on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook


def is_bare(module: nn.Module) -> bool:
    """Whether calling `module` is calling its class's forward: no hooks, no forward of its own, not compiled."""
    held = module.__dict__
    return not (
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or "forward" in held
        or held.get("_compiled_call_impl")
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def linear(layer: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """layer(x), and whether nothing else can have seen the result, so that it may be overwritten."""
    # A compiler goes past nn.Module itself, and would check at each call that there still are no hooks.
    if type(layer) is nn.Linear and not torch.compiler.is_compiling() and is_bare(layer):
        parameters = layer.__dict__["_parameters"]
        weight = parameters.get("weight")  # missing where another library put a tensor of its own in its place
        if weight is not None:
            return F.linear(x, weight, parameters["bias"]), True
    return layer(x), False
