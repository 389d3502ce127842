"""A torch.library custom op that costs no dispatch where nobody looks on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Op:
    """A custom op. A call goes past the dispatcher, straight to the body, where only the result is wanted.

    The dispatcher is needed by autograd, by tracers and by modes; without these it would take twice as long as the rest
    of the call, which in eager decoding is time that the GPU waits.

    Attributes:
        op: what torch.library made.
        body: what it does.
    """

    def __init__(self, name: str, body: Callable[..., Any], mutates_args: tuple[str, ...]) -> None:
        self.op = torch.library.custom_op(name, body, mutates_args=mutates_args)
        self.register_fake = self.op.register_fake
        self.register_autograd = self.op.register_autograd
        self.body = body
        self.__doc__ = body.__doc__

    def __call__(self, *args: Any) -> Any:
        """Return what the op returns."""
        return self.op(*args) if is_observed(args[0]) else self.body(*args)


def is_observed(x: Tensor) -> bool:
    """Whether autograd, a tracer or a mode has to see what is done with x."""
    return (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or type(x) not in (Tensor, nn.Parameter)
    )


def custom_op(name: str, *, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Op]:
    """Decorate the body of an op, whose type hints are its schema; see torch.library.custom_op."""
    return lambda body: Op(name, body, mutates_args)
