"""Linear layers that are split over processes by tensor parallelism: which part of them is here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ia3rt.adapters.site import Side
from ia3rt.modules.bare import computes_as_linear
from ia3rt.modules.set_forward import keeps_class_forward, parallel_style
from ia3rt.modules.sharding import is_distributed
from ia3rt.modules.tried import PLAIN_DTYPES
from ia3rt.modules.wearer import original_class


class Part(NamedTuple):
    """What of a layer's vectors this process multiplies: it follows from what it has of the layer's weight.

    Attributes:
        side: where a vector is cut: at `out` the process computes some of the layer's outputs (colwise), at `in` it
            computes with some of its inputs (rowwise). A vector at the other side is multiplied whole.
        columns: which of them.
    """

    side: Side
    columns: slice


def part_of(layer: Any) -> Part | None:
    """The part of a linear layer that is here: a run of its outputs or of its inputs; None where it is none.

    Args:
        layer: the layer, whose weight is a DTensor.
    """
    weight = layer.weight
    mesh = weight.device_mesh
    if mesh.ndim != 1:
        return None
    (placement,) = weight.placements
    dim = _split_dim(placement, weight)
    if dim is None:
        return None
    size = weight.shape[dim]
    longest = -(-size // mesh.size())  # as torch.chunk, by which Shard goes: the last may be shorter, or empty
    start = min(mesh.get_local_rank() * longest, size)
    stop = min(start + longest, size)
    if weight.to_local().shape[dim] != stop - start:
        return None
    return Part("out" if dim == 0 else "in", slice(start, stop))


def why_unworn(layer: nn.Module, side: Side) -> str | None:
    """Why a tensor-parallel layer cannot wear a vector at `side`, the end of a sentence; None where it can.

    What its forward gets and gives has to follow from its weight: x W^T for the part of W that is here.
    """
    kind = original_class(type(layer)).__name__
    if not computes_as_linear(original_class(type(layer))):
        return f"how {kind} computes with a part of its weight is not known"
    style = parallel_style(layer)
    if not keeps_class_forward(layer):
        if style is None:
            return "it has a forward of its own, set by other code, which would hide its vectors"
        return f"what transformers' {type(style).__name__} makes of its input and its output is not known"
    held: Any = layer._parameters
    weight, bias = held.get("weight"), held.get("bias")
    if not is_distributed(weight) or not (bias is None or is_distributed(bias)):
        return f"its parameters are not all of them split: {_in_words(held)}"
    if weight.dtype not in PLAIN_DTYPES or type(weight.to_local()) not in (Tensor, nn.Parameter):
        return f"its weight is quantised, a {type(weight.to_local()).__name__} of {weight.dtype}"
    part = part_of(layer)
    if part is None or not (bias is None or _goes_with(bias, part)):
        return f"what a process has of it is not one run of its outputs or of its inputs: {_in_words(held)}"
    if side == "out" and part.side == "in" and bias is not None and style is not None:
        return "transformers adds its bias after the sum over processes, past the vector of its output"
    return None


def _goes_with(bias: Any, part: Part) -> bool:
    """Whether a process has of the bias what it has of the outputs."""
    (placement,) = bias.placements if bias.device_mesh.ndim == 1 else (None,)
    if part.side == "in":
        return placement is not None and bool(placement.is_replicate())
    return _split_dim(placement, bias) == 0 and len(bias.to_local()) == part.columns.stop - part.columns.start


def _split_dim(placement: Any, tensor: Tensor) -> int | None:
    """Which dimension goes over the processes, in one run each; None where none does."""
    from torch.distributed.tensor import Shard  # not before: importing it takes a while

    return placement.dim % tensor.dim() if type(placement) is Shard else None  # a subclass takes other runs


def _in_words(parameters: Mapping[str, Any]) -> str:
    """How parameters are placed."""
    return ", ".join(
        f"{name} {list(each.placements) if is_distributed(each) else 'in each process'}"
        for name, each in parameters.items()
        if each is not None
    )
