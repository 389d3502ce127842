"""Which layers a vector can be multiplied into, and why not where it cannot."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ia3rt.modules.tried import PLAIN_DTYPES, with_tensors
from ia3rt.modules.wearer import original_class
from ia3rt.modules.weights import dense_weight, quantised_weight


def mergeable_weight(
    path: str, layer: nn.Module, s_in: Tensor | None, s_out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A layer's weight as [out, in], maybe a view of the parameter, and its bias.

    A layer with a forward that is not known is tried out: with its weight and bias scaled, it has to compute what it
    computes with its input and output scaled.

    Args:
        path: where it is, for errors.
        layer: the layer.
        s_in: what its input is to be scaled by, [in]; None for nothing.
        s_out: what its output is to be scaled by, [out]; None for nothing.

    Raises:
        ValueError: no scale can be multiplied into it: its weight is quantised, or not its own, or not all of it.
    """
    kind = original_class(type(layer)).__name__
    weight, bias = dense_weight(layer)
    is_known = weight is not None
    if weight is None and quantised_weight(layer) is None and isinstance(layer, nn.Linear):
        weight, bias = layer.weight, layer.bias
    if weight is None or type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in PLAIN_DTYPES:
        held = "packed" if weight is None else f"a {type(weight).__name__} of {weight.dtype}"
        raise ValueError(
            f"cannot merge into {path!r}: its weight is quantised ({held}, in a {kind}); merge into the model it is "
            "made from"
        )
    if layer._parameters.get("weight") is None:
        raise ValueError(
            f"cannot merge into {path!r}: its weight is no parameter, but computed from others (in a {kind}): make "
            "it one first (torch.nn.utils.parametrize.remove_parametrizations, prune.remove)"
        )
    if not is_known and not _acts_alike(path, layer, s_in, s_out):
        raise ValueError(
            f"cannot merge into {path!r}: with its weight and bias scaled, a {kind} gives other numbers than with its "
            "input and output scaled, for some inputs at least: what its forward gives does not scale as they do"
        )
    return weight, bias


def _acts_alike(path: str, layer: nn.Module, s_in: Tensor | None, s_out: Tensor | None) -> bool:
    """Whether scaling weight and bias is scaling input and output; tried in float64.

    Each row is of another magnitude, and a scale of many of them is tried beside the one that is asked for: a clamp, a
    soft cap or a threshold does nothing to ordinary numbers. With small weights too, as a bias hides what is smaller.
    """
    one = with_tensors(layer, lambda tensor: tensor.detach().double() if tensor.is_floating_point() else tensor)
    weight, bias = one.weight, one.bias
    generator = torch.Generator().manual_seed(0)

    def random(make: Callable[..., Tensor], *shape: int) -> Tensor:
        return make(shape, generator=generator, dtype=torch.float64).to(weight.device)

    x = random(torch.randn, 25, one.in_features)
    x *= torch.logspace(-4, 8, len(x), dtype=x.dtype, device=x.device)[:, None]
    exact = [None if scale is None else scale.to(weight) for scale in (s_in, s_out)]
    strong = [None if scale is None else scale * 10 ** (4 * random(torch.rand, len(scale)) - 2) for scale in exact]
    try:
        with torch.no_grad():
            for (before, after), size in ((exact, 1.0), (strong, 1.0), (strong, 1e-4)):
                w, b = weight * size, None if bias is None else bias * size
                one._parameters.update(weight=w, bias=b)
                expected = one.forward(x if before is None else x * before)
                expected = expected if after is None else expected * after
                w = w if before is None else w * before
                one._parameters["weight"] = w if after is None else w * after[:, None]
                one._parameters["bias"] = b if b is None or after is None else b * after
                difference = (one.forward(x) - expected).abs().amax(-1)
                largest = expected.abs().amax(-1)
                if not (difference <= 1e-4 * largest)[largest.isfinite()].all():  # some compute in float32
                    return False
    except Exception as error:
        raise ValueError(
            f"cannot merge into {path!r}: what the forward of its {original_class(type(layer)).__name__} computes is "
            f"not known, and trying it out fails: {error}"
        ) from error
    return True
