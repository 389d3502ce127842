"""Whether what is done now is also done later, for rows that wear something else; or is not done at all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_transform = torch._C._functorch.peek_interpreter_stack
_modes = torch._C._len_torch_dispatch_stack


def is_transformed() -> bool:
    """Whether torch.func transforms what is done (grad, jvp, vmap, functionalize): tensors stand for others then."""
    return _transform() is not None


def may_be_kept() -> bool:
    """Whether somebody sees what an operation gives, and may keep it: a transform, or a dispatch mode, as selective
    activation checkpointing is. A compiler sees what is done to it later, too."""
    return _transform() is not None or (not torch.compiler.is_compiling() and _modes() > 0)


def is_traced() -> bool:
    """Whether a compiler or an export reads this; not where such a one calls code that it does not read.

    `torch.compiler.is_compiling` is true there too.
    """
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


def is_captured(x: Tensor) -> bool:
    """Whether a CUDA graph captures what is done with x."""
    return not is_traced() and x.is_cuda and torch.cuda.is_current_stream_capturing()


def has_no_numbers(x: Tensor) -> bool:
    """Whether only shapes are computed: on the meta device, or in FakeTensorMode."""
    return x.is_meta or isinstance(x, FakeTensor)
