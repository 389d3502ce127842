"""The torch backend's arithmetic: y ∘ s in float32, rounded once, with as few and as small operations as possible."""

from __future__ import annotations

import torch
from torch import Tensor

# Multiplying bfloat16 by float32 on a CPU makes float32 copies of the operands. Past a megabyte or so the allocator
# maps and unmaps them each time, which costs thirty times the multiplication: larger tensors go piece by piece.
_PIECE = 1 << 18


def scale_(y: Tensor, scale: Tensor, tokens: Tensor | None) -> Tensor:
    """Scales `y` in place and returns it.

    Args:
        y: [..., width], any floating dtype, computed by the caller: what another module returns may be its input, a
            buffer of its own or a view that autograd forbids to write on, and belongs to whoever else holds it.
        scale: the composed mixes at this site, float32: [width] for all rows, or [rows, 1, width].
        tokens: int64 [tokens], which row of `scale` each token wears; None where `scale` is by row or for all.

    Raises:
        ValueError: `y` does not divide into the rows that `scale` or `tokens` has.
    """
    if tokens is None and scale.dim() == 1 and (y.dtype is scale.dtype or y.numel() <= _PIECE):
        return y.mul_(scale)  # what decoding does: the rest would take longer than the multiplication
    _multiply_(*_aligned(y, scale, tokens))
    return y


def scaled(x: Tensor, scale: Tensor, tokens: Tensor | None) -> Tensor:
    """The scaled `x`, in x's dtype; `x` itself stays as it is. Arguments and errors as `scale_`."""
    source, scale = _aligned(x, scale, tokens)
    if source.dtype == scale.dtype:
        return (source * scale).view(x.shape)
    out = source.clone(memory_format=torch.contiguous_format)
    _multiply_(out, scale)
    return out.view(x.shape)


def _aligned(x: Tensor, scale: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Views `x` so that `scale` broadcasts over it."""
    if tokens is not None:
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) != len(tokens):
            raise ValueError(f"the route is for {len(tokens)} tokens, but a layer got {len(flat)}")
        return flat, scale.reshape(-1, scale.shape[-1]).index_select(0, tokens)
    if scale.dim() == 1 or (x.dim() == 3 and x.shape[0] == scale.shape[0]):
        return x, scale
    rows = scale.shape[0]
    if x.shape[0] % rows:
        raise ValueError(f"the route is for {rows} rows, but a layer got {x.shape[0]}, which is no multiple of that")
    # Beams, returned sequences and flattened tokens of one prompt stand next to each other.
    return x.reshape(rows, -1, x.shape[-1]), scale


def _multiply_(y: Tensor, scale: Tensor) -> None:
    whole = y.dtype == scale.dtype or y.numel() <= _PIECE or y.is_cuda or torch.compiler.is_compiling()
    if whole or y.requires_grad or scale.requires_grad:
        y.mul_(scale)
    elif len(y) == 1:
        _multiply_(y[0], scale[0] if scale.dim() == y.dim() else scale)
    else:
        step = max(1, _PIECE // y[0].numel())
        by_row = scale.dim() == y.dim() and len(scale) > 1
        for start in range(0, len(y), step):
            rows = slice(start, start + step)
            _multiply_(y[rows], scale[rows] if by_row else scale)
