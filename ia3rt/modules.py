"""The drop-in modules: a patched layer is the layer it was, with its input and output scaled."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ia3rt import eager, ops
from ia3rt.sites import Side

if TYPE_CHECKING:
    from ia3rt.routing import Routing


class IA3Layer(nn.Module):
    """Mixed into the class of a patched layer, in place: the module object, its parameters and hooks stay.

    Attributes:
        ia3_routing: what the model's rows wear, shared by all its patched layers.
        ia3_in, ia3_out: the positions of this layer's sites in the bank; None where it has no such site.
        ia3_follow: moves the bank after this layer moved to another device.
    """

    ia3_routing: Routing
    ia3_in: int | None
    ia3_out: int | None
    ia3_follow: Callable[[torch.device], None]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """s_out ∘ layer(s_in ∘ x); the layer's bias is scaled too (Liu et al. 2022)."""
        routing = self.ia3_routing
        if routing.backend == "triton":
            weight, bias = dense_weight(self)
            if weight is not None:
                return self._fused(x, weight, bias)
        if self.ia3_in is not None:
            x = eager.scale_input(x, routing.composed.scales[self.ia3_in], routing.tokens)
        y = super().forward(x, *args, **kwargs)
        if self.ia3_out is not None:
            eager.scale_output_(y, routing.composed.scales[self.ia3_out], routing.tokens)
        return y  # type: ignore[no-any-return]

    def _fused(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        tables = self.ia3_routing.tables
        l_in = None if self.ia3_in is None else tables.bank[self.ia3_in]
        l_out = None if self.ia3_out is None else tables.bank[self.ia3_out]
        return ops.linear(x, weight, bias, l_in, l_out, tables.mixes, tables.route)  # type: ignore[no-any-return]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Lets the bank follow `model.to(device)`."""
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.ia3_follow(next(self.parameters()).device)
        return result


def dense_weight(layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The layer's weight as [out, in] and its bias, where a kernel can read them; None where they are quantised."""
    original = original_class(type(layer))
    if original is nn.Linear:
        return layer.weight, layer.bias  # type: ignore[return-value]
    if original.__name__ == "Conv1D":
        return layer.weight.t(), layer.bias  # type: ignore[operator, return-value]
    return None, None


def original_class(cls: type) -> type:
    """The class that a patched layer had."""
    return cls.__bases__[1] if issubclass(cls, IA3Layer) else cls


_patched: dict[type, type] = {}


def patched_class(cls: type) -> type:
    """The drop-in class for layers of type `cls`, one and the same for all of them."""
    if cls not in _patched:
        doc = f"{cls.__name__} with IA³."
        _patched[cls] = type(f"IA3{cls.__name__}", (IA3Layer, cls), {"__module__": __name__, "__doc__": doc})
    return _patched[cls]


def wrap(layer: nn.Module, routing: Routing, follow: Callable[[torch.device], None]) -> None:
    """Turns `layer` into its drop-in; it wears nothing until `place` says where its vectors are."""
    layer.__class__ = patched_class(type(layer))
    vars(layer).update(ia3_routing=routing, ia3_follow=follow, ia3_in=None, ia3_out=None)
    _redirect(layer)


def place(layer: nn.Module, side: Side, position: int) -> None:
    """Says which of the bank's sites scales `layer` at `side`."""
    vars(layer)[f"ia3_{side}"] = position


def unwrap(layer: nn.Module) -> None:
    """Makes `layer` what it was before `wrap`."""
    layer.__class__ = original_class(type(layer))
    for name in ("ia3_routing", "ia3_follow", "ia3_in", "ia3_out"):
        del vars(layer)[name]
    _redirect(layer)


def _redirect(layer: nn.Module) -> None:
    # accelerate's device_map hooks keep the forward they replaced; they have to call the class's present one.
    if "_old_forward" in vars(layer):
        vars(layer)["_old_forward"] = MethodType(type(layer).forward, layer)
