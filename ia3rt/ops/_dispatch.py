"""What every op does around its kernel: choose who computes, lay tensors out, keep the inputs for the gradient."""

import importlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ia3rt import reference

_transform = torch._C._functorch.peek_interpreter_stack

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def kernels_work() -> bool:
    """Whether Triton is installed: a failure of another kind is no reason to be silently slow."""
    try:
        importlib.import_module("ia3rt.kernels.linear")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return False
    return True


def needs_torch() -> bool:
    """Whether only torch's operations will do: torch.func transforms what is done, or it is differentiated forwards."""
    return _transform() is not None or forward_ad._current_level >= 0


def backend(x: Tensor) -> Literal["triton", "torch"]:
    """Return what computes an operation on x."""
    on_device = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return "triton" if on_device and x.dtype in TRITON_DTYPES and kernels_work() and not needs_torch() else "torch"


def may_repeat(x: Tensor) -> bool:
    """Whether a launch on x may go past Triton's own way."""
    if backend(x) != "triton":
        return False
    from ia3rt.kernels import launch  # not before: Triton may not be installed

    return launch.can_repeat() and not launch.is_watched() and not launch.is_recording()


def module(name: str, x: Tensor) -> Any:
    """Return kernels/<name>.py, or ia3rt.reference, which has a stand-in for each of its launchers."""
    return importlib.import_module(f"ia3rt.kernels.{name}") if backend(x) == "triton" else reference


def implementation(name: str, x: Tensor) -> Callable[..., Tensor]:
    """Return kernels/<name>.py's launcher `name`, or what stands in for it."""
    run: Callable[..., Tensor] = getattr(module(name, x), name)
    return run


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def flat(x: Tensor) -> Tensor:
    """Return x as [M, width] with contiguous columns: a view wherever one exists."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # -1 may be any number where the width is 0
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def side_by_side(row: Tensor | None) -> Tensor | None:
    """Return a bias, or another row of numbers, with them side by side, as kernels read it: itself where they are."""
    return None if row is None else row.contiguous()


def new(x: Tensor, width: int) -> Tensor:
    """Return what every op returns: [..., width], contiguous, uninitialised."""
    return x.new_empty((*x.shape[:-1], width))


def save_inputs(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
