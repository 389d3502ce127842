"""How kernels are launched, and what is remembered of a launch, so that one like it needs little more than pointers.

Triton's own way to a launch (JITFunction.run) binds, specialises and looks up every argument, each time: three times
what the launch itself takes. `record` notes what a function launched, and on what: the compiled kernels, their grids,
and which of their arguments lie in the function's inputs or in tensors that it made. ops/_bound.py launches that again,
by CompiledKernel.run, for inputs that differ in nothing that Triton or a launcher looks at.
"""

import functools
import inspect
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.compiler import CompiledKernel


class Launch(NamedTuple):
    """One kernel that was launched."""

    compiled: CompiledKernel
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    """In the order of the kernel's parameters, as CompiledKernel.run takes them: tensors, numbers, tuples of both."""


class Multiplication(NamedTuple):
    """A matmul by torch, into a tensor."""

    function: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    out: Tensor


class Recorded(NamedTuple):
    """What a function did."""

    result: Any
    launches: list[Launch | Multiplication]
    made: list[Tensor]
    """The tensors that it made, uninitialised: its results and workspaces."""
    is_all: bool
    """Whether it did nothing else that another call would have to do."""


_RUN = ["gridX", "gridY", "gridZ", "stream", "function"]
_THEN = ["kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"]
"""The parameters of CompiledKernel.run before the kernel's own; in Triton 3.6 the last four are among its `args`."""

_MAKES = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_MULTIPLIES: dict[Any, Callable[..., Tensor]] = {torch.ops.aten.mm.out: torch.mm, torch.ops.aten.addmm.out: torch.addmm}
_records = threading.local()


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel by Triton's own way; constants are its compile-time arguments and the compiler's options."""
    compiled = kernel[grid](*arguments, **constants)
    launches: list[Launch | Multiplication] | None = getattr(_records, "launches", None)
    if launches is not None:
        rest = (constants[name] for name in kernel.arg_names[len(arguments) :])
        launches.append(Launch(compiled, (*grid, 1, 1)[:3], (*arguments, *rest)))


def precision_of(dtype: torch.dtype) -> str:
    """Return what tl.dot makes of numbers of a dtype: "tf32" where they are fp32 and torch's matmuls may round them so.

    torch's newer setting tells of what is set by the older ones too; they raise once the newer one was used.
    """
    return "tf32" if dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def is_recording() -> bool:
    """Return whether a function that is recorded is running: what it calls is part of it."""
    return getattr(_records, "launches", None) is not None


def record(function: Callable[..., Any], *arguments: Any) -> Recorded:
    """Call a function, and note what it launches."""
    assert not is_recording(), "recordings do not nest"
    launches: list[Launch | Multiplication] = []
    _records.launches = launches
    try:
        with _Watch() as watch:
            result = function(*arguments)
    finally:
        _records.launches = None
    return Recorded(result, launches, watch.made, watch.only_makes_and_views and bool(launches))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which tensors are made, and whether torch computes anything."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[Tensor] = []
        self.only_makes_and_views = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _MAKES:
            self.made.append(result)
        elif func in _MULTIPLIES and set(kwargs or ()) == {"out"}:
            _records.launches.append(Multiplication(_MULTIPLIES[func], args, kwargs["out"]))
        elif not func.is_view:
            self.only_makes_and_views = False
        return result


def is_watched() -> bool:
    """Return whether somebody has to see each launch: a profiler's hooks, instrumentation, or Triton's debugging."""
    runtime = knobs.runtime
    return bool(
        runtime.launch_enter_hook.calls
        or runtime.launch_exit_hook.calls
        or runtime.debug
        or knobs.compilation.instrumentation_mode
    )


@functools.cache
def can_repeat() -> bool:
    """Return whether compiled kernels can be launched again: not in the interpreter, nor by a Triton not known here.

    Warns of the latter, once.
    """
    if knobs.runtime.interpret:
        return False
    launcher = triton.runtime.driver.active.launcher_cls
    parameters = list(inspect.signature(launcher.__call__).parameters)[1:]
    if parameters in ([*_RUN, "args"], [*_RUN, *_THEN, "args"]):
        return True
    warnings.warn(
        f"Triton {triton.__version__} launches kernels in a way that ia3rt does not know, {launcher.__name__}"
        f"({', '.join(parameters)}): every launch goes Triton's own way, which takes three times as long",
        stacklevel=2,
    )
    return False
