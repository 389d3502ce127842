"""The first half of an MLP: its first matrices, and the activation, scaled."""

import torch.nn.functional as F
from torch import Tensor

from ia3rt.reference._activation import activation


def gate_up(
    x: Tensor,
    gate: Tensor,
    bias_gate: Tensor | None,
    up: Tensor | None,
    bias_up: Tensor | None,
    l: Tensor | None,  # noqa: E741
    mixes: Tensor,
    route: Tensor,
    kind: str,
) -> Tensor:
    """Return s ∘ act(W_gate x + b_gate) ∘ (W_up x + b_up) for x [..., K], weights [N, K] and l [capacity, N].

    Rounds where the MLPs of transformers and PEFT round: W x + b of each, and as `activation` does. The kernel rounds
    once.
    """
    multiplied = None if up is None else F.linear(x, up, bias_up)
    return activation(F.linear(x, gate, bias_gate), multiplied, l, mixes, route, kind)
