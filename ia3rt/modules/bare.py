"""Calling a module without nn.Module's hop, where nothing hangs on it: a tenth of a small layer's time on a CPU.

And computing what its forward does past that, so that the result is ours to write on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from ia3rt.modules.channels import CONVOLUTIONS
from ia3rt.modules.same_code import same_code

_linear_forward = nn.Linear.forward
_torchs: dict[type, Any] = {cls: cls.forward for cls in (*CONVOLUTIONS, nn.Embedding)}


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


def own_linear(layer: nn.Module, x: Tensor) -> Tensor | None:
    """What nn.Linear's forward computes for x, where that is torch's own; None where the layer has to run.

    The result is nobody else's: it may be overwritten. A tensor of another library in the weight's place computes by
    that library's code, which may return anything.
    """
    parameters = layer.__dict__["_parameters"]
    weight = parameters.get("weight")  # missing where pruning or a parametrization puts another in its place
    if (type(weight) is nn.Parameter or type(weight) is Tensor) and nn.Linear.forward is _linear_forward:
        return F.linear(x, weight, parameters["bias"])
    return None


def computes_as_linear(cls: type) -> bool:
    """Whether the layers of a class compute x W^T + b from `weight` and `bias`, and nothing else.

    Those of nn.Linear do, and of its subclasses whose forward is its own, or compiles to what Falcon's does.
    """
    if not issubclass(cls, nn.Linear) or cls.__call__ is not nn.Module.__call__:
        return False
    return cls.forward is _linear_forward or same_code(cls.forward, _matmul)


def own_forward(cls: type) -> Callable[[nn.Module, Tensor], Tensor | None] | None:
    """What computes as a class's forward does, with a result that may be overwritten; None where nothing here does.

    It gives None for a layer that has to run, as `own_linear`.
    """
    if cls is nn.Linear:
        return own_linear
    known: Any = getattr(cls, "forward", None)
    if same_code(known, _conv1d):
        compute = _own_conv1d
    elif computes_as_linear(cls):
        compute = own_linear if known is _linear_forward else _own_matmul
    elif cls in _torchs and _torchs[cls] is known:
        compute = partial(_own_of_torch, known)
    else:
        return None

    def own(layer: nn.Module, x: Tensor) -> Tensor | None:
        return compute(layer, x) if cls.forward is known else None  # type: ignore[attr-defined]

    return own


def _own_conv1d(layer: nn.Module, x: Tensor) -> Tensor | None:
    parameters = layer.__dict__["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if type(weight) is not nn.Parameter or bias is None:
        return None
    return torch.addmm(bias, x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], weight.shape[1])


def _own_matmul(layer: nn.Module, x: Tensor) -> Tensor | None:
    parameters = layer.__dict__["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if type(weight) is not nn.Parameter:
        return None
    y = x @ weight.T
    return y if bias is None else y + bias


def _own_of_torch(forward: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module, x: Tensor) -> Tensor | None:
    weight = layer.__dict__["_parameters"].get("weight")
    return forward(layer, x) if type(weight) is nn.Parameter or type(weight) is Tensor else None


def _conv1d(self, x):  # type: ignore[no-untyped-def]
    """The forward of transformers' Conv1D, as its source is written."""
    size_out = x.size()[:-1] + (self.nf,)  # noqa: RUF005
    x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
    x = x.view(size_out)
    return x


def _matmul(self, input):  # type: ignore[no-untyped-def]
    """The forward of Falcon's linear layers, as its source is written: rounded before the bias is added."""
    hidden_states = input @ self.weight.T
    if self.bias is None:
        return hidden_states
    return hidden_states + self.bias


def linear(layer: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """layer(x), and whether nothing else can have seen the result, so that it may be overwritten."""
    # A compiler goes past nn.Module itself, and would check at each call that there still are no hooks.
    if type(layer) is nn.Linear and not torch.compiler.is_compiling() and is_bare(layer):
        y = own_linear(layer, x)
        if y is not None:
            return y, True
    return layer(x), False
