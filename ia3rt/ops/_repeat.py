"""Writes, from what a function launched once, a function that launches the same on other tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# What the code that Inductor writes makes its tensors with: it takes a third of torch.empty_strided's time.
_EMPTY = {
    device: getattr(torch._C._dynamo.guards, f"_empty_strided_{device}", None)
    or functools.partial(torch.empty_strided, device=device)
    for device in ("cpu", "cuda")
}


class _Unknown(Exception):  # noqa: N818  (nothing is wrong: a call of this kind is not repeated)
    """An argument of which it cannot be said where the next one is."""


def repeat_of(recorded: Any, inputs: dict[str, Tensor], parameters: Sequence[str]) -> Callable[..., Any] | None:
    """Return what repeats a call; None where nothing can.

    Args:
        recorded: what kernels.launch.record returned of it.
        inputs: every tensor that the function was given, by a name.
        parameters: those of what is returned: a tensor has its name, and p_ before it stands for where it begins. A
            tensor of which only the latter is among them cannot be given to a tensor descriptor.
    """
    if not recorded.is_all:
        return None
    try:
        return _Writer(recorded, inputs, parameters).function()
    except _Unknown:
        return None


class _Writer:
    def __init__(self, recorded: Any, inputs: dict[str, Tensor], parameters: Sequence[str]) -> None:
        self._recorded = recorded
        self._parameters = parameters
        self._inputs = inputs
        self._made = {f"y{i}": tensor for i, tensor in enumerate(recorded.made)}
        self._bases = {**inputs, **self._made}
        self._scope: dict[str, Any] = {"rebased": _rebased, "view": torch.as_strided}

    def function(self) -> Callable[..., Any]:
        from triton.runtime import driver

        results = self._recorded.result
        returned = self._results([results] if isinstance(results, Tensor) else results or [])
        self._bases |= returned  # laid out as they are returned
        device = next(iter(self._inputs.values())).device
        self._scope |= {"empty": _EMPTY[device.type], "stream": driver.active.get_current_stream}
        lines = []
        for name, tensor in self._made.items():
            made = returned.get(name, tensor)
            layout = tuple(made.shape), made.stride(), self._constant(made.dtype)
            lines.append(f"{name} = empty({layout[0]}, {layout[1]}, {layout[2]}); p_{name} = {name}.data_ptr()")
        lines.append(f"at = stream({max(0, device.index or 0)})")
        for step in self._recorded.launches:
            if hasattr(step, "out"):
                arguments = ", ".join(map(self._tensor, step.arguments))
                lines.append(f"{self._constant(step.function)}({arguments}, out={self._tensor(step.out)})")
                continue
            compiled, grid, arguments = step
            run = [self._constant(each) for each in (compiled.run, compiled.function, compiled.packed_metadata)]
            written = ", ".join(map(self._written, arguments))
            lines.append(f"{run[0]}({', '.join(map(str, grid))}, at, {run[1]}, {run[2]}, None, None, None, {written})")
        names = ", ".join(returned)
        answer = f"[{names}]" if isinstance(results, list) else f"({names},)" if isinstance(results, tuple) else names
        body = "\n    ".join([*lines, f"return {answer}"])
        exec(f"def repeat({', '.join(self._parameters)}):\n    {body}\n", self._scope)
        function: Callable[..., Any] = self._scope["repeat"]
        return function

    def _results(self, results: Sequence[Tensor]) -> dict[str, Tensor]:
        """The results by what they were made as, in their order."""
        named = {}
        for result in results:
            (name,) = [name for name, made in self._made.items() if _storage(made) == _storage(result)] or [""]
            made = self._made.get(name)
            if made is None or name in named or (made.data_ptr(), made.dtype) != (result.data_ptr(), result.dtype):
                raise _Unknown
            if made.numel() != result.numel():
                raise _Unknown
            named[name] = result
        return named

    def _written(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return self._pointer(value)
        if isinstance(value, tuple):
            return f"({' '.join(f'{self._written(each)},' for each in value)})"
        if type(value).__name__ == "TensorDescriptor":
            name = self._pointer(value.base).removeprefix("p_")
            if name not in self._made and name not in self._parameters:
                raise _Unknown  # it begins within a tensor
            return f"rebased({self._constant(_rebased(value, None))}, {name})"
        is_literal = value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))
        return repr(value) if is_literal else self._constant(value)

    def _tensor(self, tensor: Tensor) -> str:
        """The tensor itself: the known one that begins there, or a view of it."""
        name = self._pointer(tensor).removeprefix("p_")
        if name not in self._made and name not in self._parameters:
            raise _Unknown
        base = self._bases[name]
        if (base.shape, base.stride(), base.dtype) == (tensor.shape, tensor.stride(), tensor.dtype):
            return name
        if base.dtype != tensor.dtype:
            raise _Unknown
        return f"view({name}, {tuple(tensor.shape)}, {tensor.stride()}, {name}.storage_offset())"

    def _pointer(self, tensor: Tensor) -> str:
        """Where the tensor begins: the one among those known that begins there, or the only one of its storage."""
        alike = [name for name, base in self._bases.items() if _storage(base) == _storage(tensor)]
        exact = [name for name in alike if self._bases[name].data_ptr() == tensor.data_ptr()]
        if len(exact) == 1:
            return f"p_{exact[0]}"
        if len(exact) > 1 or len(alike) != 1:
            raise _Unknown
        return f"p_{alike[0]} + {tensor.data_ptr() - self._bases[alike[0]].data_ptr()}"

    def _constant(self, value: object) -> str:
        name = f"c{len(self._scope)}"
        self._scope[name] = value
        return name


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _rebased(descriptor: Any, base: Tensor | None) -> Any:
    """A tensor descriptor of another tensor; without the checks of a new one, as the layout is the same."""
    new = object.__new__(type(descriptor))
    vars(new).update(vars(descriptor), base=base)
    return new
