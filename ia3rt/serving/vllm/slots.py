"""Which of vLLM's adapter slots each token of a step wears, and how a layer's activations are scaled by it.

A layer keeps a table, float32 [slots + 1, width]: a row a slot, whose adapter or mix was composed when it got the slot,
and last a row of ones. vLLM's graphs are captured once and replayed, so what a step decides is in tensors that stay
where they are: `index`, the row that each token wears, and `state`, which a CPU op reads before it does anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ia3rt import reference
from ia3rt.eager import scale_output_
from ia3rt.ops._dispatch import backend, device_of
from ia3rt.ops._op import custom_op


class TokenSlots:
    """The slot of each token of the step that runs.

    Attributes:
        identity: the number of the row of ones, which is the number of slots.
        index: int32 [max_tokens], on the model's device. Rows past the step's tokens wear the identity: graphs are
            padded, and must not read what an earlier step left there.
        state: int32 [2], on the CPU: whether any token wears an adapter, and the row that all tokens wear, or -1.
        mixes: int32 [slots + 1, 4], on the model's device: the kernels' mix table (kernels/scale.py), in which mix i is
            row i alone.
        lora: whether any token wears a LoRA.
    """

    def __init__(self, max_tokens: int, slots: int, device: torch.device) -> None:
        self.identity = slots
        self.index = torch.full((max_tokens,), slots, dtype=torch.int32, device=device)
        self.state = torch.tensor([0, slots], dtype=torch.int32)
        rows = torch.arange(slots + 1, dtype=torch.int32)
        one = torch.ones((), dtype=torch.float32).view(torch.int32).expand(slots + 1)
        self.mixes = torch.stack([torch.zeros_like(rows), torch.ones_like(rows), rows, one], dim=1).to(device)
        self.lora = False
        self._live = 0

    def write(self, rows: Sequence[int], *, lora: bool) -> None:
        """Says which row each token wears, in place.

        Args:
            rows: a row for each token of the step; `identity` for none.
            lora: whether any of them wears a LoRA.

        Raises:
            ValueError: there are more tokens than vLLM said there would be.
        """
        count = len(rows)
        if count > len(self.index):
            raise ValueError(f"a step of {count} tokens, but the most was to be {len(self.index)}")
        self.lora = lora
        worn = set(rows)
        self.state[0] = int(worn - {self.identity} != set())
        self.state[1] = rows[0] if len(worn) == 1 else -1
        # From pinned memory, so that the host need not wait for what the device is doing.
        given = torch.tensor(rows, dtype=torch.int32, pin_memory=self.index.is_cuda)
        self.index[:count].copy_(given, non_blocking=True)
        if self._live > count:
            self.index[count : self._live].fill_(self.identity)
        self._live = count


@custom_op("ia3rt::scale_slots_", mutates_args=("y",))
def scale_slots_(y: Tensor, start: int, table: Tensor, index: Tensor, state: Tensor, mixes: Tensor) -> None:
    """Multiply columns [start, start + width) of y by what each token wears, in place, in float32, rounded once.

    Args:
        y: [..., N], tokens by columns, contiguous.
        start: the first column.
        table: float32 [slots + 1, width].
        index: TokenSlots.index.
        state: TokenSlots.state.
        mixes: TokenSlots.mixes.

    """
    active, uniform = state.tolist()
    if not active:
        return
    rows = y.view(-1, y.shape[-1])[:, start : start + table.shape[1]]
    if backend(y) == "triton":
        from ia3rt.kernels.scale import scale

        # By token even where all wear one: what runs while a graph is captured is what runs ever after.
        with device_of(y):
            scale(rows, table, mixes, index[: len(rows)], out=rows)
    elif uniform >= 0:
        scale_output_(rows, table[uniform], None)
    else:
        scale_output_(rows, table, index[: len(rows)])


@scale_slots_.register_fake
def _(y: Tensor, start: int, table: Tensor, index: Tensor, state: Tensor, mixes: Tensor) -> None:
    return None


@custom_op("ia3rt::scaled_slots")
def scaled_slots(x: Tensor, table: Tensor, index: Tensor, state: Tensor, mixes: Tensor) -> Tensor:
    """Return x scaled as `scale_slots_` does it; x stays as it is."""
    y = x.clone(memory_format=torch.contiguous_format)
    scale_slots_(y, 0, table, index, state, mixes)
    return y


@scaled_slots.register_fake
def _(x: Tensor, table: Tensor, index: Tensor, state: Tensor, mixes: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@custom_op("ia3rt::activation_slots")
def activation_slots(x: Tensor, table: Tensor, index: Tensor, state: Tensor, mixes: Tensor, kind: str) -> Tensor:
    """Return act(gate) ∘ up, scaled by what each token wears: one kernel, which reads x once and writes once.

    Args:
        x: [..., 2 width], gate before up.
        table: float32 [slots + 1, width].
        index: TokenSlots.index.
        state: TokenSlots.state.
        mixes: TokenSlots.mixes.
        kind: one of reference.ACTIVATIONS.

    """
    width = x.shape[-1] // 2
    flat = x.reshape(-1, 2 * width)
    gate, up = flat[:, :width], flat[:, width:]
    worn = table if state[0] else None
    if backend(x) == "triton":
        from ia3rt.kernels.activation import activation

        with device_of(x):
            y = activation(gate, up, worn, mixes, index[: len(flat)], kind)
    else:
        y = reference.activation(gate, up, worn, mixes, index[: len(flat)], kind)
    scaled: Tensor = y.view(*x.shape[:-1], width)
    return scaled


@activation_slots.register_fake
def _(x: Tensor, table: Tensor, index: Tensor, state: Tensor, mixes: Tensor, kind: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
