"""Lets the kernels follow torch.autocast, which knows only torch's own operations."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands of a matmul as torch.autocast would cast them; as they are outside of it."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in (x, *others))
