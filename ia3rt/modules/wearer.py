"""How a module comes to wear vectors: in place, by a class between it and its own; and how it is given back."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ia3rt.adapters.site import Side
from ia3rt.routing.layout import Layout, Unknown
from ia3rt.routing.routing import Routing
from ia3rt.routing.worn import Worn


class How(NamedTuple):
    """How a vector is applied.

    Attributes:
        kernel: the operation that it is part of.
        config: how that is launched; empty where there is nothing to choose.
        why: why this one.
    """

    kernel: str
    config: str
    why: str


class Wearer(nn.Module):
    """Mixed into the class of a patched module, in place: the module object, its parameters and hooks stay.

    Attributes:
        ia3_routing: what the model's rows wear, shared by all its patched modules.
        ia3_in, ia3_out: the positions in the bank of the sites that act here; None where there is none.
        ia3_layouts: where the rows of a batch are in what is scaled here, by its number of dimensions.
        ia3_follow: moves the bank after this module moved to another device.
    """

    ia3_routing: Routing
    ia3_in: int | None
    ia3_out: int | None
    ia3_layouts: dict[int, Layout | Unknown]
    ia3_follow: Callable[[torch.device], None]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Lets the bank follow `model.to(device)`."""
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.ia3_follow(computing_tensor(self).device)
        return result

    def ia3_scale(self, position: int, x: Tensor, worn: Worn) -> Tensor | None:
        """What x, [..., width], is multiplied by; None where that is nothing.

        Raises:
            ValueError: rows wear different mixes, and it is not known whose each element of x is.
        """
        return worn.composed.scale(position) if not worn.by_row else self.ia3_routing.by_row(self, position, x, worn)

    def ia3_is_row_major(self, x: Tensor, worn: Worn) -> bool:
        """Whether x lies as the kernels read it where rows wear different mixes.

        Raises:
            ValueError: it is not known whose each element of x is.
        """
        position = self.ia3_out if self.ia3_in is None else self.ia3_in
        assert position is not None
        return self.ia3_routing.is_row_major(self, position, x, worn)

    @classmethod
    def is_fused(cls, module: nn.Module) -> bool:
        """Whether a kernel applies the vectors of `module` on the Triton backend."""
        raise NotImplementedError

    def ia3_how(self, side: Side, rows: int) -> How:
        """What applies the vector at `side` for so many rows: see explanation.py."""
        raise NotImplementedError


def computing_tensor(module: nn.Module) -> Tensor:
    """A parameter or buffer that says where a module computes, and in what; GPTQ's layers have buffers only."""
    tensors = [*module.parameters(), *module.buffers()]
    return next((tensor for tensor in tensors if tensor.dtype.is_floating_point), tensors[0])


def original_class(cls: type) -> type:
    """The class that a patched module had."""
    return cls.__bases__[1] if issubclass(cls, Wearer) else cls


_patched: dict[tuple[type, type], type] = {}


def patched_class(mixin: type[Wearer], cls: type) -> type:
    """The drop-in class for modules of type `cls`, one and the same for all of them."""
    if (mixin, cls) not in _patched:
        doc = f"{cls.__name__} with IA³."
        _patched[mixin, cls] = type(f"IA3{cls.__name__}", (mixin, cls), {"__module__": __name__, "__doc__": doc})
    return _patched[mixin, cls]


def wrap(module: nn.Module, mixin: type[Wearer], routing: Routing, follow: Callable[[torch.device], None]) -> None:
    """Turns `module` into its drop-in; it wears nothing until `place` says where its vectors are."""
    module.__class__ = patched_class(mixin, type(module))
    vars(module).update(ia3_routing=routing, ia3_follow=follow, ia3_in=None, ia3_out=None, ia3_layouts={})
    _redirect(module)


def place(module: nn.Module, side: Side, position: int) -> None:
    """Says which of the bank's sites scales `module` at `side`."""
    vars(module)[f"ia3_{side}"] = position


def unwrap(module: nn.Module) -> None:
    """Makes `module` what it was before `wrap`."""
    module.__class__ = original_class(type(module))
    for name in [name for name in vars(module) if name.startswith("ia3_")]:
        del vars(module)[name]
    _redirect(module)


def _redirect(module: nn.Module) -> None:
    # accelerate's device_map hooks keep the forward they replaced; they have to call the class's present one.
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = MethodType(type(module).forward, module)
