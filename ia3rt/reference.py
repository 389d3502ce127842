"""Each operation in a few lines of plain torch: the truth that the kernels are compared with, and their stand-in.

A scale is composed in fp32, or in fp64 where the bank or the activation is; so a float64 call of anything here is the
exact formula (IA³, Liu et al. 2022, section 3.3), and all of it is differentiable. The words are the design's:

    bank    [capacity, width]        one row an adapter; row 0 is all ones
    mixes   int32 [slots, 2 + 2K]    mode (0 product, 1 linear), count n, K bank rows, K weights (fp32 bits)
    route   int32 [R]                row m of M wears mix route[m // (M // R)]; R = 1 is the uniform batch
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu"]


class MixTable(NamedTuple):
    """A mix table taken apart, one row a mix: views of the table, but for the two masks."""

    product: Tensor
    """bool [slots, 1]: whether the mix is a product; else it is a weighted sum."""
    live: Tensor
    """bool [slots, K]: whether this place of the mix holds an adapter."""
    ids: Tensor
    """int32 [slots, K]: rows of the bank."""
    weights: Tensor
    """fp32 [slots, K]."""


def split_mixes(mixes: Tensor) -> MixTable:
    """Take a mix table apart."""
    size = (mixes.shape[1] - 2) // 2
    places = torch.arange(size, device=mixes.device)
    ids, weights = mixes[:, 2 : 2 + size], mixes[:, 2 + size : 2 + 2 * size]
    return MixTable(mixes[:, :1] == 0, places < mixes[:, 1:2], ids, weights.view(torch.float32))


def compose(bank: Tensor, mixes: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return [slots, width], what each mix is at these columns of the bank: Π_j l_j, or Σ_j w_j l_j.

    Computed and returned in `dtype`; where None, in fp32, or in fp64 for a bank in fp64.
    """
    dtype = dtype or torch.promote_types(bank.dtype, torch.float32)
    product, live, ids, weights = split_mixes(mixes)
    s = product.to(dtype).expand(-1, bank.shape[1])
    for j in range(ids.shape[1]):
        l_j = bank[ids[:, j]].to(dtype)
        folded = torch.where(product, s * l_j, s + weights[:, j, None].to(dtype) * l_j)
        s = torch.where(live[:, j, None], folded, s)
    return s


def _scale_dtype(x: Tensor, l: Tensor) -> torch.dtype:  # noqa: E741
    return torch.promote_types(torch.promote_types(x.dtype, l.dtype), torch.float32)


def _by_route(x: Tensor, route: Tensor) -> Tensor:
    """Return x as [R, M // R, width], the rows of each entry of route together."""
    return x.reshape(route.shape[0], -1, x.shape[-1])


def scale(x: Tensor, l: Tensor, mixes: Tensor, route: Tensor) -> Tensor:  # noqa: E741
    """Return s ∘ x for x [..., width] and l [capacity, width]: computed in fp32 (fp64) and rounded once to x.dtype."""
    s = compose(l, mixes[route], _scale_dtype(x, l))
    return (_by_route(x, route) * s[:, None, :]).to(x.dtype).reshape(x.shape)


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


def bank_gradient(dy: Tensor, x: Tensor, l: Tensor, mixes: Tensor, route: Tensor) -> Tensor:  # noqa: E741
    """Return dL/dl as [capacity, width], given dL/dy for y = s ∘ x, both [..., width].

        dL/ds   = Σ_rows dy ∘ x
        ds/dl_j = Π_{i≠j} l_i   of a product,   w_j   of a linear mix

    The product without l_j comes from the products before and after it, never from a division, so a factor of zero is
    right. Sums over rows and over mixes have a fixed order: the same inputs give the same bits.
    """
    dtype = _scale_dtype(x, l)
    ds = _by_route(dy.to(dtype) * x.to(dtype), route).sum(1)
    if route.shape[0] > mixes.shape[0]:  # one entry a token: first add up what wears the same mix
        ds = _add_rows(ds, route, mixes.shape[0])
    else:
        mixes = mixes[route]
    product, live, ids, weights = split_mixes(mixes)
    factors = [torch.where(live[:, j, None], l[ids[:, j]].to(dtype), 1.0) for j in range(ids.shape[1])]
    before = [torch.ones_like(ds)]
    for factor in factors:
        before.append(before[-1] * factor)
    after = torch.ones_like(ds)
    dl = torch.zeros(l.shape, dtype=dtype, device=l.device)
    for j in reversed(range(len(factors))):
        partial = torch.where(product, before[j] * after, weights[:, j, None].to(dtype))
        dl += _add_rows(torch.where(live[:, j, None], ds * partial, 0.0), ids[:, j], l.shape[0])
        after = after * factors[j]
    return dl.to(l.dtype)


def _add_rows(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """Return [rows, width], where row i is the sum of the values whose index is i, in their order.

    It is what an embedding's gradient is, which unlike index_add is deterministic on every device.
    """
    added: Tensor = torch.ops.aten.embedding_dense_backward(values, index.contiguous(), rows, -1, False)
    return added
