"""An op whose weights and vectors stay where they are: what its last launches were is not worked out again.

Between an op and its kernel's launch lie checks, the choice of a kernel and of block sizes, and Triton's own look at
every argument: more time than a small kernel takes. All of it depends on shapes, strides, dtypes, the device and the
alignment of pointers alone. So a call that is like one before in these launches the same compiled kernels again. What
does that is written out as source and compiled, as dataclasses and Triton do it: a loop over arguments would take
longer than all the rest.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ia3rt.ops import _dispatch
from ia3rt.ops._op import Calls, _current_device, _fp32_precision, is_observed

_calls: dict[object, Calls] = {}
"""Of an op with fixed arguments that are laid out alike."""


class Tables(Protocol):
    """What the rows of a forward wear.

    Attributes:
        mixes: int32 [slots, 2 + 2K].
        route: int32 [R].
        layout: equal where the shapes of both are.
    """

    mixes: Tensor
    route: Tensor
    layout: tuple[int, ...]


class Callee(Protocol):
    """An op, or several of them and views as one function."""

    def __call__(self, *args: Any) -> Any:
        """Return the result, by the dispatcher where somebody looks on."""
        ...

    @property
    def body(self) -> Callable[..., Any]:
        """The same where nobody does."""
        ...


class Bound:
    """An op, and those of its arguments that stay as they are, and where they are, as long as this is used.

    Args:
        op: the op; one that writes on its arguments is called as it is.
        fixed: arguments by name.

    Attributes:
        call: (tables, the op's other tensors in their order) to what the op returns.
    """

    call: Callable[..., Any]

    def __init__(self, op: Callee, **fixed: Any) -> None:
        self._op = op
        self._fixed = fixed
        self._names = list(inspect.signature(op.body).parameters)
        self._inputs = [name for name in self._names if name not in {*fixed, "mixes", "route"}]
        self._tensors = {name: fixed[name] for name in self._names if isinstance(fixed.get(name), Tensor)}
        pointers = [tensor.data_ptr() for tensor in self._tensors.values()]
        layouts = tuple((name, _layout(tensor)) for name, tensor in self._tensors.items())
        rest = tuple((name, value) for name, value in fixed.items() if name not in self._tensors)
        self._calls = _calls.setdefault((op, layouts, rest), Calls())
        self.call = self._through_op
        if not getattr(op, "writes", None) and not any(at % 16 for at in pointers) and _dispatch.kernels_work():
            from ia3rt.kernels import launch  # not before: Triton may not be installed

            if launch.can_repeat():
                make = _caller(len(self._inputs), len(pointers))
                self.call = make(
                    self._calls.repeats, self._miss, launch.knobs.runtime, *self._tensors.values(), *pointers
                )

    def _arguments(self, tables: Tables, inputs: Sequence[Tensor]) -> list[Any]:
        given = {**self._fixed, **dict(zip(self._inputs, inputs, strict=True))}
        given |= {"mixes": tables.mixes, "route": tables.route}
        return [given[name] for name in self._names]

    def _through_op(self, tables: Tables, *inputs: Tensor) -> Any:
        return self._op(*self._arguments(tables, inputs))

    def _miss(self, tables: Tables, *inputs: Tensor) -> Any:
        """The op's result; what it launches is noted, where a call that is like this one can launch it again."""
        observed = any(map(is_observed, inputs)) or any(
            x.data_ptr() % 16 for x in (*inputs, tables.mixes, tables.route)
        )
        if observed or not _dispatch.may_repeat(inputs[0]):
            return self._through_op(tables, *inputs)
        key = _key(tables, inputs)
        if not self._calls.is_second(key):
            return self._through_op(tables, *inputs)
        names = *(f"x{i}" for i in range(len(inputs))), *(f"t{i}" for i in range(len(self._tensors))), "mixes", "route"
        tensors = dict(zip(names, (*inputs, *self._tensors.values(), tables.mixes, tables.route), strict=True))
        arguments, parameters = self._arguments(tables, inputs), _parameters(len(inputs), len(self._tensors))
        return self._calls.note(key, self._op.body, arguments, tensors, parameters)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device()


def _key(tables: Tables, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """What `_caller` looks up."""
    key: list[Any] = [tables.layout, _current_device(), inputs[0].dtype is torch.float32 and _fp32_precision()]
    for x in inputs:
        key += [x.dtype, x.shape, x.stride(), x.get_device()]
    return tuple(key)


def _parameters(inputs: int, tensors: int) -> list[str]:
    """What a repeated call is given."""
    xs, ts = [f"x{i}" for i in range(inputs)], [f"t{i}" for i in range(tensors)]
    return [*xs, *(f"p_{x}" for x in xs), *ts, *(f"p_{t}" for t in ts), "p_mixes", "p_route"]


@functools.cache
def _caller(inputs: int, tensors: int) -> Callable[..., Callable[..., Any]]:
    """Write `call` for so many inputs and fixed tensors."""
    xs, ts = [f"x{i}" for i in range(inputs)], [f"t{i}" for i in range(tensors)]
    given, fixed = ", ".join(xs), [*ts, *(f"p_{t}" for t in ts)]
    arguments = ", ".join([*_parameters(inputs, tensors)[:-2], "tables.mixes.data_ptr()", "tables.route.data_ptr()"])
    layouts = ", ".join(f"{x}.dtype, {x}.shape, {x}.stride(), {x}.get_device()" for x in xs)
    source = f"""
def make({", ".join(["known", "miss", "hooks", *fixed])}):
    def call(tables, {given}):
        if (compiling() or grad() or modes() or functorch() is not None or forward_ad._current_level >= 0
                or {" or ".join(f"type({x}) is not Tensor" for x in xs)}
                or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls or hooks.debug):
            return miss(tables, {given})
        {"; ".join(f"p_{x} = {x}.data_ptr()" for x in xs)}
        repeat = known.get((tables.layout, device(), x0.dtype is fp32 and precision(), {layouts}))
        if repeat is None or ({" | ".join(f"p_{x}" for x in xs)}) & 15:
            return miss(tables, {given})
        return repeat({arguments})
    return call
"""
    scope = {
        "compiling": torch.compiler.is_compiling,
        "grad": torch.is_grad_enabled,
        "modes": torch._C._len_torch_dispatch_stack,
        "functorch": torch._C._functorch.peek_interpreter_stack,
        "forward_ad": forward_ad,
        "device": _current_device,
        "fp32": torch.float32,
        "precision": _fp32_precision,
        "Tensor": Tensor,
    }
    exec(source, scope)
    made: Callable[..., Callable[..., Any]] = scope["make"]  # type: ignore[assignment]
    return made
