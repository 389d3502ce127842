"""y_a = s_a ∘ (W_a x + b_a) and y_b = s_b ∘ (W_b x + b_b): two linear layers that read one x (k, v), in one launch.

Alone, each has so few tiles that it leaves processors idle, or that more programs have to share its sums. The tiles of
a come first, then those of b. The weights stay where they are: nothing is copied. The kernels are those of linear.py.
"""

import torch
from torch import Tensor

from ia3rt.kernels.linear import launch
from ia3rt.kernels.linear_tile import Layer
from ia3rt.kernels.tuned import LinearConfig


def are_alike(a: Layer, b: Layer) -> bool:
    """Return whether one launch serves both layers: the same shapes, strides and dtypes, and the same absent."""

    def layout(tensor: Tensor | None) -> tuple[torch.dtype, torch.Size, tuple[int, ...]] | None:
        return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride())

    return all(layout(of_a) == layout(of_b) for of_a, of_b in zip(a, b, strict=True))


def linear_pair(
    x: Tensor,
    a: tuple[Tensor, Tensor | None, Tensor | None],
    b: tuple[Tensor, Tensor | None, Tensor | None],
    mixes: Tensor,
    route: Tensor,
    out: tuple[Tensor, Tensor] | None = None,
    config: LinearConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (s_a ∘ (W_a x + b_a), s_b ∘ (W_b x + b_b)) in x.dtype. Layers that are not alike take two launches.

    Args:
        x: [M, K], fp16, bf16 or fp32; any row stride, columns contiguous.
        a: weight [N_a, K] of x.dtype, any strides; bias [N_a], contiguous, or None; the output site's slice of the
            bank [capacity, N_a], any row stride, columns contiguous, or None.
        b: the same of N_b columns.
        mixes: int32 [slots, 2 + 2K], contiguous.
        route: int32 [R], contiguous, M % R == 0.
        out: [M, N_a] and [M, N_b] of x.dtype, contiguous; made where None.
        config: block sizes; chosen by shape and device where None.

    """
    y_a, y_b = out or (x.new_empty((x.shape[0], weight.shape[0])) for weight, *_ in (a, b))
    layers = Layer(*a), Layer(*b)
    if are_alike(*layers):
        launch(x, None, layers, (y_a, y_b), mixes, route, config)
    else:
        for layer, y in zip(layers, (y_a, y_b), strict=True):
            launch(x, None, [layer], [y], mixes, route, config)
    return y_a, y_b
