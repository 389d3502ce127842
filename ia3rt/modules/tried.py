"""A layer tried out by itself, to see what its forward does: on a copy, with other tensors in the place of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ia3rt.modules.bare import computes_as_linear
from ia3rt.modules.wearer import original_class

PLAIN_DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
"""Of weights that are numbers as they are, not quantised ones."""


def with_tensors(module: Any, made: Callable[[Tensor], Tensor]) -> Any:
    """What `module` would be without ia3rt, in evaluation, with `made` of each of its tensors; all else is shared."""
    cls: Any = original_class(type(module))
    copied = cls.__new__(cls)
    held = {name: value for name, value in vars(module).items() if not name.startswith("ia3_")}
    held["training"] = False
    for kind in ("_parameters", "_buffers"):
        held[kind] = {
            name: None if each is None else made(each)
            for name, each in held[kind].items()
            if not name.startswith("ia3_")
        }
    held["_modules"] = {
        name: None if each is None else with_tensors(each, made) for name, each in held["_modules"].items()
    }
    vars(copied).update(held)
    return copied


def unfit_result(layer: nn.Module) -> str | None:
    """What a layer of a subclass of nn.Linear gives, in words, where that is nothing that a vector could scale.

    That is a tuple, as routers give, or a tensor of another width than out_features. None where it is a tensor of that
    width, or cannot be told: its forward runs on tensors without numbers, and takes more than an input or is quantised.
    """
    if computes_as_linear(original_class(type(layer))) or type(layer._parameters.get("weight")) is not nn.Parameter:
        return None
    if not all(each.dtype in PLAIN_DTYPES for each in layer.parameters()):
        return None
    try:
        with torch.no_grad():
            one = with_tensors(layer, lambda tensor: tensor.detach().to("meta"))
            y = one.forward(torch.empty(2, one.in_features, dtype=one.weight.dtype, device="meta"))
    except Exception:
        return None
    if not isinstance(y, Tensor):
        return f"a {type(y).__name__}"
    return None if y.shape[-1:] == (one.out_features,) else f"{y.shape[-1] if y.dim() else 1} numbers a row"
