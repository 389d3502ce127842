"""A torch.library custom op that costs no dispatch where nobody looks on, and no launch twice the work of the first."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ia3rt.ops import _dispatch
from ia3rt.ops._repeat import repeat_of

_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
# As kernels.launch.precision_of asks, in a tenth of its time; only fp32 is rounded by it.
_fp32_precision: Callable[[], str] = functools.partial(torch._C._get_fp32_precision_getter, "cuda", "matmul")
MOST = 512  # calls that are known of an op; each takes some kilobytes


class Op:
    """A custom op. A call goes past the dispatcher, straight to the body, where only the result is wanted.

    The dispatcher is needed by autograd, by tracers and by modes; without these it would take twice as long as the rest
    of the call, which in eager decoding is time that the GPU waits. And a third call that is like the first in all that
    the checks, a launcher or Triton looks at launches what the second did.

    Attributes:
        op: what torch.library made.
        body: what it does.
        writes: the places of the arguments that it writes on.
    """

    def __init__(self, name: str, body: Callable[..., Any], mutates_args: tuple[str, ...]) -> None:
        self.body = _outside_autocast(body)
        self.writes = [place for place, name in enumerate(inspect.signature(body).parameters) if name in mutates_args]
        self._calls = Calls()
        # The schema is read from the body; what runs is `_run`.
        schema = torch.library.infer_schema(body, mutates_args=mutates_args)
        self.op = torch.library.custom_op(name, self._run, mutates_args=mutates_args, schema=schema)
        self.register_autograd = self.op.register_autograd
        if not mutates_args:
            self.register_autograd(functools.partial(_refuse, name))
        self.__doc__ = body.__doc__

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate what makes the result without numbers; see torch.library.register_fake."""
        self._fake = fake
        self.op.register_fake(fake)
        return fake

    def __call__(self, *args: Any) -> Any:
        """Return what the op returns."""
        if not is_observed(args[0]):
            result = self._run(*args)
            if self.writes:  # as the dispatcher would tell autograd
                torch._C._increment_version([args[place] for place in self.writes])
            return result
        if _dispatch.needs_torch() and not torch.compiler.is_compiling():
            return self.body(*args)  # in torch's operations, each of which has all derivatives
        return self.op(*args)

    def _run(self, *args: Any) -> Any:
        if not _dispatch.may_repeat(args[0]):
            # Beside vectors that have numbers the dispatcher does not see that the result has none.
            return self._fake(*args) if args[0].is_meta else self.body(*args)
        tensors = [each for each in args if isinstance(each, Tensor)]
        pointers = [tensor.data_ptr() for tensor in tensors]
        seen: list[Any] = [_current_device(), args[0].dtype is torch.float32 and _fp32_precision()]
        for each in args:
            seen += (each.dtype, each.shape, each.stride(), each.get_device()) if isinstance(each, Tensor) else (each,)
        key = tuple(seen)
        repeat = self._calls.repeats.get(key)
        is_aligned = not any(at & 15 for at in pointers)
        if repeat is not None and is_aligned:
            return repeat(*tensors, *pointers)
        if not is_aligned or not self._calls.is_second(key):
            return self.body(*args)
        names = [f"x{i}" for i in range(len(tensors))]
        parameters = [*names, *(f"p_{name}" for name in names)]
        return self._calls.note(key, self.body, args, dict(zip(names, tensors, strict=True)), parameters)


def _outside_autocast(body: Callable[..., Any]) -> Callable[..., Any]:
    """An op's dtypes are its arguments': autocast would change those of torch's operations in it."""

    @functools.wraps(body)
    def run(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return body(*args)
        with torch.autocast(args[0].device.type, enabled=False):
            return body(*args)

    return run


def _refuse(name: str, ctx: Any, *gradients: Any) -> None:
    """The backward of an op that has no other."""
    raise NotImplementedError(
        f"{name} has no gradient: gradients of gradients (create_graph=True) are computed by "
        'patch(model, backend="torch")'
    )


class Calls:
    """The calls of a function that were made.

    Attributes:
        repeats: by all that matters, what launches the same kernels again.
    """

    def __init__(self) -> None:
        self.repeats: dict[object, Callable[..., Any]] = {}
        self._seen: dict[object, bool] = {}  # those made once, and whether a second one is worth noting

    def is_second(self, key: object) -> bool:
        """Whether a call is the second of its kind: the first may be the only one, as the length of a prompt is."""
        if key not in self._seen:
            if len(self._seen) >= MOST:
                self._seen.clear()
                self.repeats.clear()
            self._seen[key] = True
            return False
        return self._seen[key]

    def note(
        self,
        key: object,
        function: Callable[..., Any],
        arguments: Any,
        tensors: dict[str, Tensor],
        parameters: list[str],
    ) -> Any:
        """Makes a call, notes what repeats it, where something does, and returns its result."""
        from ia3rt.kernels import launch  # not before: Triton may not be installed

        recorded = launch.record(function, *arguments)
        device = next(iter(tensors.values()))
        if not device.is_cuda or device.get_device() == _current_device():
            repeat = repeat_of(recorded, tensors, parameters)
            if repeat is not None:
                self.repeats[key] = repeat
        self._seen[key] = False
        return recorded.result


def is_observed(x: Tensor) -> bool:
    """Whether autograd, a tracer or a mode has to see what is done with x."""
    return (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or _dispatch.needs_torch()
        or type(x) not in (Tensor, nn.Parameter)
    )


def custom_op(name: str, *, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Op]:
    """Decorate the body of an op, whose type hints are its schema; see torch.library.custom_op."""
    return lambda body: Op(name, body, mutates_args)
