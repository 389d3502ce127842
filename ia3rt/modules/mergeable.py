"""Which layers a vector can be multiplied into, and why not where it cannot."""

from __future__ import annotations

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
            "input and output scaled: they are not all that its forward computes by"
        )
    return weight, bias


def _acts_alike(path: str, layer: nn.Module, s_in: Tensor | None, s_out: Tensor | None) -> bool:
    """Whether scaling weight and bias is scaling input and output; tried in float64."""
    one = with_tensors(layer, lambda tensor: tensor.detach().double() if tensor.is_floating_point() else tensor)
    x = torch.randn(4, one.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.to(one.weight.device)
    before, after = (1 if scale is None else scale.double() for scale in (s_in, s_out))
    try:
        with torch.no_grad():
            expected = one.forward(x * before) * after
            weight, bias = one.weight * before, one.bias
            one._parameters["weight"] = weight if s_out is None else weight * s_out.double()[:, None]
            one._parameters["bias"] = None if bias is None else bias * after
            merged = one.forward(x)
        difference, largest = (merged - expected).abs().max(), expected.abs().max()
    except Exception as error:
        raise ValueError(
            f"cannot merge into {path!r}: what the forward of its {original_class(type(layer)).__name__} computes is "
            f"not known, and trying it out fails: {error}"
        ) from error
    return not largest.isfinite() or bool(difference <= 1e-4 * largest)  # some compute in float32
