"""The weights of linear layers, as the kernels read them."""

from __future__ import annotations

from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ia3rt.modules.bare import computes_as_linear
from ia3rt.modules.quantised import Quantised, is_gptq, read_gptq, read_torchao
from ia3rt.modules.wearer import original_class


def dense_weight(layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The layer's weight as [out, in] and its bias, where a kernel can read them and they are all of it; else None."""
    original = original_class(type(layer))
    if original is nn.Linear or computes_as_linear(original):
        # A subclass of Tensor, such as torchao's, is no matrix that a kernel could read at its address.
        is_plain = type(layer.weight) in (Tensor, nn.Parameter, FakeTensor)
        return (layer.weight, layer.bias) if is_plain else (None, None)  # type: ignore[return-value]
    if original.__name__ == "Conv1D":
        return layer.weight.t(), layer.bias  # type: ignore[operator, return-value]
    return None, None


def quantised_weight(layer: nn.Module) -> Quantised | None:
    """What the layer holds, where it is quantised and the kernels compute with its format."""
    original = original_class(type(layer))
    if original is nn.Linear or computes_as_linear(original):
        return read_torchao(layer.weight)  # type: ignore[arg-type]
    return read_gptq(layer) if is_gptq(layer) else None
