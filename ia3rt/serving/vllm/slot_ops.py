"""The kernels that scale tokens by their slots' rows, as ops that vLLM's compilation leaves whole.

All of them read TokenSlots' tensors when they run, not when they were traced. `active` is read on the CPU, before
anything is launched: vLLM captures other graphs for steps in which nothing is worn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ia3rt import reference
from ia3rt.modules.eager import scale_
from ia3rt.ops._dispatch import backend, device_of
from ia3rt.ops._op import custom_op


@custom_op("ia3rt::scale_slots_", mutates_args=("y",))
def scale_slots_(y: Tensor, table: Tensor, index: Tensor, active: Tensor, mixes: Tensor) -> None:
    """Multiply y by what each token wears, in place, in float32, rounded once.

    Args:
        y: [..., width], contiguous.
        table: float32 [slots + 1, width].
        index: TokenSlots.index.
        active: TokenSlots.active.
        mixes: TokenSlots.mixes.

    """
    if not active:
        return
    rows = y.view(-1, y.shape[-1])
    if backend(y) == "triton":
        from ia3rt.kernels.scale import scale

        with device_of(y):
            scale(rows, table, mixes, index[: len(rows)], out=rows)
    else:
        scale_(rows, table.index_select(0, index[: len(rows)]))


@scale_slots_.register_fake
def _(y: Tensor, table: Tensor, index: Tensor, active: Tensor, mixes: Tensor) -> None:
    return None


@custom_op("ia3rt::scaled_slots")
def scaled_slots(x: Tensor, table: Tensor, index: Tensor, active: Tensor, mixes: Tensor) -> Tensor:
    """Return x scaled as `scale_slots_` does it; x stays as it is."""
    y = x.clone(memory_format=torch.contiguous_format)
    scale_slots_(y, table, index, active, mixes)
    return y


@scaled_slots.register_fake
def _(x: Tensor, table: Tensor, index: Tensor, active: Tensor, mixes: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@custom_op("ia3rt::linear_slots")
def linear_slots(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, index: Tensor, active: Tensor, mixes: Tensor
) -> Tensor:
    """Return W x + b, scaled by what each token wears in the epilogue, where that is the faster way (linear_plan.py).

    Args:
        x: [..., in].
        weight: [out, in] of x.dtype.
        bias: [out] or None.
        table: float32 [slots + 1, out].
        index: TokenSlots.index.
        active: TokenSlots.active.
        mixes: TokenSlots.mixes.

    """
    if not active:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if backend(x) == "triton":
        from ia3rt.kernels.linear import linear

        with device_of(x):
            y = linear(rows, weight, bias, None, table, mixes, index[: len(rows)])
    else:
        y = scale_(F.linear(rows, weight, bias), table.index_select(0, index[: len(rows)]))
    scaled: Tensor = y.view(*x.shape[:-1], len(weight))
    return scaled


@linear_slots.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, index: Tensor, active: Tensor, mixes: Tensor
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@custom_op("ia3rt::activation_slots")
def activation_slots(x: Tensor, table: Tensor, index: Tensor, active: Tensor, mixes: Tensor, kind: str) -> Tensor:
    """Return act(gate) ∘ up, scaled by what each token wears: one kernel, which reads x once and writes once.

    Args:
        x: [..., 2 width], gate before up.
        table: float32 [slots + 1, width].
        index: TokenSlots.index.
        active: TokenSlots.active.
        mixes: TokenSlots.mixes.
        kind: one of reference.ACTIVATIONS.

    """
    width = x.shape[-1] // 2
    flat = x.reshape(-1, 2 * width)
    gate, up = flat[:, :width], flat[:, width:]
    worn = table if active else None
    if backend(x) == "triton":
        from ia3rt.kernels.activation import activation

        with device_of(x):
            y = activation(gate, up, worn, mixes, index[: len(flat)], kind)
    else:
        y = reference.activation(gate, up, worn, mixes, index[: len(flat)], kind)
    scaled: Tensor = y.view(*x.shape[:-1], width)
    return scaled


@activation_slots.register_fake
def _(x: Tensor, table: Tensor, index: Tensor, active: Tensor, mixes: Tensor, kind: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
