"""The drop-in modules: a patched module is the one it was, with its input and output scaled."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from ia3rt import eager, ops
from ia3rt.autocast import autocast
from ia3rt.quantised import Quantised, is_gptq, read_gptq, read_torchao
from ia3rt.sites import Side, module_widths

if TYPE_CHECKING:
    from ia3rt.pair import Pair
    from ia3rt.routing import Routing


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
        ia3_follow: moves the bank after this module moved to another device.
    """

    ia3_routing: Routing
    ia3_in: int | None
    ia3_out: int | None
    ia3_follow: Callable[[torch.device], None]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Lets the bank follow `model.to(device)`."""
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.ia3_follow(computing_tensor(self).device)
        return result

    @classmethod
    def is_fused(cls, module: nn.Module) -> bool:
        """Whether a kernel applies the vectors of `module` on the Triton backend."""
        raise NotImplementedError

    def ia3_how(self, side: Side, rows: int) -> How:
        """What applies the vector at `side` for so many rows: see explanation.py."""
        raise NotImplementedError


class IA3Layer(Wearer):
    """A linear layer whose input and output are scaled.

    Attributes:
        ia3_pair: what computes this layer and another in one launch, on the Triton backend; None where it is alone.
    """

    ia3_pair: Pair | None = None
    _is_linear: ClassVar[bool]

    def __init_subclass__(cls) -> None:
        """Looks at the original class once, when the drop-in class is made."""
        super().__init_subclass__()
        cls._is_linear = original_class(cls) is nn.Linear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """s_out ∘ layer(s_in ∘ x); the layer's bias is scaled too (Liu et al. 2022)."""
        routing = self.ia3_routing
        if routing.backend == "triton":
            fused = self._by_kernel(x)
            if fused is not None:
                return fused
        if self.ia3_in is not None:
            x = eager.scale_input(x, routing.composed.scale(self.ia3_in), routing.tokens)
        parameters = self._parameters
        weight = parameters.get("weight") if self._is_linear else None
        # What nn.Linear does, but for the ways that nn.Module goes to find its weight: they cost more than the scale.
        y = super().forward(x, *args, **kwargs) if weight is None else F.linear(x, weight, parameters["bias"])
        if self.ia3_out is not None:
            eager.scale_output_(y, routing.composed.scale(self.ia3_out), routing.tokens)
        return y

    def _by_kernel(self, x: Tensor) -> Tensor | None:
        """The result by the Triton backend; None where no kernel fits, or nothing is scaled."""
        if self.ia3_in is None and self.ia3_out is None:
            return None
        weight, bias = dense_weight(self)
        if weight is not None:
            y = None if self.ia3_pair is None else self.ia3_pair.forward(self, x)
            return self._fused(x, weight, bias) if y is None else y
        quantised = quantised_weight(self)
        return None if quantised is None else self._fused_quantised(x, quantised)

    @classmethod
    def is_fused(cls, module: nn.Module) -> bool:
        """Whether its weight is one that the kernels read."""
        return dense_weight(module)[0] is not None or quantised_weight(module) is not None

    def ia3_how(self, side: Side, rows: int) -> How:
        """As `forward` chooses."""
        if self.ia3_routing.backend == "torch":
            where = "in place in its output" if side == "out" else "in a copy of its input"
            return How("multiplication", "", f"the module runs as it is; the vector is multiplied {where}")
        weight, _ = dense_weight(self)
        quantised = quantised_weight(self)
        if quantised is not None:
            from ia3rt.kernels.linear_quantised import plan  # not before: Triton may not be installed

            widths = module_widths(self)
            assert widths is not None
            x = computing_tensor(self).new_empty(rows, widths[0])
            config = plan(x, widths[1], quantised.kind, quantised.group_size, self._is_uniform)
            where = "the vector is in the epilogue" if side == "out" else "x is scaled in a pass before"
            why = f"{quantised.kind} is dequantised in registers; {where}"
            return How("linear_quantised", config.in_words(), why)
        if weight is None:
            return How("multiplication", "", "the module runs as it is: no kernel reads a weight of its kind")
        if ops.backend(weight) == "torch":
            return How("multiplication", "", f"no kernel computes in {weight.dtype}")
        from ia3rt.kernels.linear_plan import explain  # not before: Triton may not be installed

        x, size = weight.new_empty(rows, weight.shape[1]), (self.ia3_routing.tables.mixes.shape[1] - 2) // 2
        paired = side == "out" and self.ia3_pair is not None and self.ia3_pair.in_order
        config, why = explain(x, weight, side, size, self._is_uniform, 1 + paired)
        return How("linear_pair" if paired else "linear", config, why)

    @property
    def _is_uniform(self) -> bool:
        return self.ia3_routing.route.index is None

    def _fused(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear(*autocast(x, weight, bias), *self._worn())  # type: ignore[no-any-return]

    def _fused_quantised(self, x: Tensor, weight: Quantised) -> Tensor:
        stored, (x, bias) = weight[:4], autocast(x, getattr(self, "bias", None))  # type: ignore[assignment]
        return ops.linear_quantised(  # type: ignore[no-any-return]
            x, *stored, bias, *self._worn(), weight.kind, weight.group_size
        )

    def _worn(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """What the kernels read of the bank for input and output, the mixes, and the route."""
        tables = self.ia3_routing.tables
        l_in = None if self.ia3_in is None else tables.bank[self.ia3_in]
        l_out = None if self.ia3_out is None else tables.bank[self.ia3_out]
        return l_in, l_out, tables.mixes, tables.route


def dense_weight(layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The layer's weight as [out, in] and its bias, where a kernel can read them; None where they are quantised."""
    original = original_class(type(layer))
    if original is nn.Linear:
        # A subclass of Tensor, such as torchao's, is no matrix that a kernel could read at its address.
        is_plain = type(layer.weight) in (Tensor, nn.Parameter, FakeTensor)
        return (layer.weight, layer.bias) if is_plain else (None, None)  # type: ignore[return-value]
    if original.__name__ == "Conv1D":
        return layer.weight.t(), layer.bias  # type: ignore[operator, return-value]
    return None, None


def quantised_weight(layer: nn.Module) -> Quantised | None:
    """What the layer holds, where it is quantised and the kernels compute with its format."""
    if original_class(type(layer)) is nn.Linear:
        return read_torchao(layer.weight)  # type: ignore[arg-type]
    return read_gptq(layer) if is_gptq(layer) else None


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
    vars(module).update(ia3_routing=routing, ia3_follow=follow, ia3_in=None, ia3_out=None)
    _redirect(module)


def place(module: nn.Module, side: Side, position: int) -> None:
    """Says which of the bank's sites scales `module` at `side`."""
    vars(module)[f"ia3_{side}"] = position


def unwrap(module: nn.Module) -> None:
    """Makes `module` what it was before `wrap`."""
    module.__class__ = original_class(type(module))
    for name in ("ia3_routing", "ia3_follow", "ia3_in", "ia3_out", "ia3_pair"):
        vars(module).pop(name, None)
    _redirect(module)


def _redirect(module: nn.Module) -> None:
    # accelerate's device_map hooks keep the forward they replaced; they have to call the class's present one.
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = MethodType(type(module).forward, module)
