"""A linear layer, or two that read the same x, with their inputs and outputs scaled."""

import torch.nn.functional as F
from torch import Tensor

from ia3rt.reference._scale import scale


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    l_in: Tensor | None,
    l_out: Tensor | None,
    mixes: Tensor,
    route: Tensor,
) -> Tensor:
    """Return s_out ∘ (W (s_in ∘ x) + b) for x [..., K_in] and weight [N, K_in].

    Rounds where PEFT rounds: s_in ∘ x, W · + b, and the result. The kernel leaves out the rounding in the middle.
    """
    if l_in is not None:
        x = scale(x, l_in, mixes, route)
    y = F.linear(x, weight, bias)
    return y if l_out is None else scale(y, l_out, mixes, route)


def linear_pair(
    x: Tensor,
    a: tuple[Tensor, Tensor | None, Tensor | None],
    b: tuple[Tensor, Tensor | None, Tensor | None],
    mixes: Tensor,
    route: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return s_a ∘ (W_a x + b_a) and s_b ∘ (W_b x + b_b); a layer is its weight, bias and l_out."""
    y_a, y_b = (linear(x, weight, bias, None, l_out, mixes, route) for weight, bias, l_out in (a, b))
    return y_a, y_b
