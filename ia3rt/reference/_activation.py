"""An MLP's activation, scaled, and its gradient."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ia3rt.reference._scale import scale

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
}


def _quick_gelu_gradient(dy: Tensor, z: Tensor) -> Tensor:
    p = torch.sigmoid(1.702 * z)
    return dy * (p + z * (p * (1 - p)) * 1.702)  # in this order nothing overflows


_aten = torch.ops.aten
ACTIVATION_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": _aten.silu_backward,
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda dy, z: _aten.gelu_backward(dy, z, approximate="tanh"),
    "relu": lambda dy, z: _aten.threshold_backward(dy, z, 0),
    "relu2": lambda dy, z: dy * 2 * F.relu(z),
    "quick_gelu": _quick_gelu_gradient,
}
"""dL/dz of each activation, given dL/dy: for where autograd does not reach, inside an op."""


def activation(
    gate: Tensor,
    up: Tensor | None,
    l: Tensor | None,  # noqa: E741
    mixes: Tensor,
    route: Tensor,
    kind: str,
) -> Tensor:
    """Return s ∘ act(gate) ∘ up for gate and up [..., width] and l [capacity, width]; without up or s where None.

    Rounds where the MLPs of transformers and PEFT round: act(gate), times up, and the result. The kernel rounds once.
    """
    y = ACTIVATIONS[kind](gate)
    if up is not None:
        y = y * up
    return y if l is None else scale(y, l, mixes, route)


def activation_gradient(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    l: Tensor | None,  # noqa: E741
    mixes: Tensor,
    route: Tensor,
    kind: str,
) -> list[Tensor]:
    """Return [dL/dgate], and dL/dup behind it where there is an up, given dL/dy for y = s ∘ act(gate) ∘ up."""
    dz = dy if l is None else scale(dy, l, mixes, route)
    if up is None:
        return [ACTIVATION_GRADIENTS[kind](dz, gate)]
    return [ACTIVATION_GRADIENTS[kind](dz * up, gate), dz * ACTIVATIONS[kind](gate)]
