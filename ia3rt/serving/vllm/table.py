"""What the slots hold at one side of a layer, and how a step's tokens are scaled by it."""

from __future__ import annotations

import torch
from torch import Tensor

from ia3rt.modules.eager import scale_
from ia3rt.ops import backend
from ia3rt.serving.vllm.slot_ops import activation_slots, linear_slots, scale_slots_, scaled_slots
from ia3rt.serving.vllm.slots import TokenSlots


class SlotTable:
    """A row for each slot, composed when an adapter or a mix got the slot, and last a row of ones.

    On a GPU kernels scale, by token even where all wear one row: what runs while a graph is captured is what runs ever
    after. On a CPU plain torch does.

    Args:
        slots: what each token wears.
        width: how many numbers a row has.

    Attributes:
        rows: float32 [slots + 1, width], on the model's device.
        by_kernel: whether kernels scale: `linear` and `activation` may then be called.
    """

    def __init__(self, slots: TokenSlots, width: int) -> None:
        self.rows = torch.ones(slots.identity + 1, width, dtype=torch.float32, device=slots.index.device)
        self.by_kernel = backend(self.rows) == "triton"
        self._slots = slots
        self._columns = slice(width, 0)  # those that any vector was for: qkv_proj's begin with q's, which wear ones
        self._for_ops = self.rows, slots.index, slots.active, slots.mixes
        self._worn = torch.empty(0, dtype=torch.float32, device="cpu")
        self._worn_of = (-1, 0)

    def reset(self) -> None:
        """Makes all rows ones, that of the identity too, which a device that slept may have lost."""
        self.rows.fill_(1.0)
        self._worn_of = (-1, 0)

    def clear(self, slot: int) -> None:
        """Makes a slot's row ones."""
        self.rows[slot] = 1.0
        self._worn_of = (-1, 0)

    def fill(self, slot: int, start: int, vector: Tensor) -> None:
        """Copies a vector into a slot's row, from a column on."""
        stop = start + len(vector)
        self.rows[slot, start:stop].copy_(vector)
        self._columns = slice(min(self._columns.start, start), max(self._columns.stop, stop))
        self._worn_of = (-1, 0)

    def scale_(self, y: Tensor) -> None:
        """Multiplies y by what each token wears, in place, in float32, rounded once.

        Args:
            y: [tokens, width] or [1, tokens, width], contiguous.
        """
        if self.by_kernel:
            scale_slots_(y, *self._for_ops)
        elif torch.compiler.is_compiling():
            y.mul_(self._gathered(y))  # the compiler fuses it with what stands around it
        elif self._worn_of == (self._slots.step, y.shape[-2]):
            y.mul_(self._worn)
        elif self._slots.runs:
            self._scale_step_(y)

    def scaled(self, x: Tensor) -> Tensor:
        """Returns x scaled as `scale_` does it; x stays as it is.

        Args:
            x: [tokens, width] or [1, tokens, width].
        """
        if self.by_kernel:
            result: Tensor = scaled_slots(x, *self._for_ops)
            return result
        if torch.compiler.is_compiling():
            return (x * self._gathered(x)).to(x.dtype)
        if self._slots.runs:
            x = x.clone(memory_format=torch.contiguous_format)
            self.scale_(x)
        return x

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns W x + b, scaled; see slot_ops.linear_slots."""
        y: Tensor = linear_slots(x, weight, bias, *self._for_ops)
        return y

    def activation(self, x: Tensor, kind: str) -> Tensor:
        """Returns act(gate) ∘ up, scaled; see slot_ops.activation_slots."""
        y: Tensor = activation_slots(x, *self._for_ops, kind)
        return y

    def _gathered(self, y: Tensor) -> Tensor:
        tokens = y.numel() // y.shape[-1]
        return self.rows.index_select(0, self._slots.index[:tokens]).view(y.shape)

    def _scale_step_(self, y: Tensor) -> None:
        tokens = y.shape[-2]
        if tokens > self.rows.shape[0]:
            for start, stop, row in self._slots.runs:
                scale_(y[..., start:stop, self._columns], self.rows[row, self._columns])
            return
        # Decoding: tokens wear the same step after step, so their rows, no more numbers than the table has, are kept.
        # To take only some columns would take longer than to multiply all.
        self._worn = self._gathered(y)
        self._worn_of = (self._slots.step, tokens)
        y.mul_(self._worn)
