"""The torch backend's arithmetic: y ∘ s in float32, rounded once, with as few and as small operations as possible."""

from __future__ import annotations

import torch
from torch import Tensor

from ia3rt.routing.traced import may_be_kept

# Multiplying bfloat16 by float32 on a CPU makes float32 copies of the operands. Past a megabyte or so the allocator
# maps and unmaps them each time, which costs thirty times the multiplication: larger tensors go piece by piece.
_PIECE = 1 << 18


def scaled_own(y: Tensor, scale: Tensor) -> Tensor:
    """The scaled `y`: in place, but where somebody else may keep it, or one scale stands for several.

    Args:
        y: [..., width], any floating dtype, computed by the caller: what another module returns may be its input, a
            buffer of its own or a view that autograd forbids to write on, and belongs to whoever else holds it.
        scale: float32, broadcasts over y: [width] where all rows wear one mix.
    """
    if may_be_kept():
        return (y * scale).to(y.dtype)
    if scale.dim() == 1 and (y.dtype is scale.dtype or y.numel() <= _PIECE):
        return y.mul_(scale)  # what decoding does: the rest would take longer than the multiplication
    return scale_(y, scale)


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """The scaled `x`, in x's dtype; `x` itself stays as it is. Arguments as `scaled_own`."""
    if x.dtype == scale.dtype:
        return x * scale
    if may_be_kept():
        return (x * scale).to(x.dtype)
    return scale_(x.clone(memory_format=torch.contiguous_format), scale)


def scale_(y: Tensor, scale: Tensor) -> Tensor:
    """Scales `y` in place, whoever looks on, and returns it. Arguments as `scaled_own`."""
    whole = y.dtype == scale.dtype or y.numel() <= _PIECE or y.is_cuda or torch.compiler.is_compiling()
    if whole or y.requires_grad or scale.requires_grad:
        y.mul_(scale)
    elif len(y) == 1:
        scale_(y[0], scale[0] if scale.dim() == y.dim() else scale)
    else:
        step = max(1, _PIECE // y[0].numel())
        by_row = scale.dim() == y.dim() and len(scale) > 1
        for start in range(0, len(y), step):
            rows = slice(start, start + step)
            scale_(y[rows], scale[rows] if by_row else scale)
    return y
