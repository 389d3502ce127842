"""The drop-in of a linear layer: the module that it was, with its input and output scaled."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from ia3rt import ops
from ia3rt.adapters.site import Side
from ia3rt.modules import eager
from ia3rt.modules.autocast import autocast
from ia3rt.modules.prepared import Prepared, can_prepare, has_parameters
from ia3rt.modules.quantised import Quantised
from ia3rt.modules.sites import module_widths
from ia3rt.modules.wearer import How, Wearer, computing_tensor, original_class
from ia3rt.modules.weights import dense_weight, quantised_weight
from ia3rt.routing.tables import MixTables
from ia3rt.routing.worn import Worn


class JointLaunch(Protocol):
    """What computes a layer and another in one launch: see pair.py.

    Attributes:
        in_order: whether the layers are called in the order in which it can.
    """

    in_order: bool

    def forward(self, layer: IA3Layer, x: Tensor, tables: MixTables) -> Tensor | None:
        """The result of `layer`, one of the two, for x; None where it has to compute that itself."""
        ...


class IA3Layer(Wearer):
    """A linear layer whose input and output are scaled.

    Attributes:
        ia3_pair: what computes this layer and another in one launch, on the Triton backend; None where it is alone.
        ia3_prepared: what it launches, on the Triton backend, as long as its weight and the bank stay.
    """

    ia3_pair: JointLaunch | None = None
    ia3_prepared: Prepared | None = None
    _is_linear: ClassVar[bool]

    def __init_subclass__(cls) -> None:
        """Looks at the original class once, when the drop-in class is made."""
        super().__init_subclass__()
        cls._is_linear = original_class(cls) is nn.Linear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """s_out ∘ layer(s_in ∘ x); the layer's bias is scaled too (Liu et al. 2022)."""
        routing = self.ia3_routing
        worn = routing.now()
        if routing.backend == "triton":
            fused = self._by_kernel(x, worn)
            if fused is not None:
                return fused
        if self.ia3_in is not None:
            scale = self.ia3_scale(self.ia3_in, x, worn)
            x = x if scale is None else eager.scale_input(x, scale)
        parameters = self._parameters
        weight = parameters.get("weight") if self._is_linear else None
        # What nn.Linear does, but for the ways that nn.Module goes to find its weight: they cost more than the scale.
        y = super().forward(x, *args, **kwargs) if weight is None else F.linear(x, weight, parameters["bias"])
        if self.ia3_out is not None:
            scale = self.ia3_scale(self.ia3_out, y, worn)
            if scale is not None:
                eager.scale_output_(y, scale)
        return y

    def _by_kernel(self, x: Tensor, worn: Worn) -> Tensor | None:
        """The result by the Triton backend; None where no kernel fits, or nothing is scaled."""
        if self.ia3_in is None and self.ia3_out is None:
            return None
        if worn.by_row and not self.ia3_is_row_major(x, worn):
            return None
        tables = worn.tables
        if self.ia3_pair is not None:
            y = self.ia3_pair.forward(self, x, tables)
            if y is not None:
                return y
        if can_prepare(tables):
            prepared = self.ia3_prepared
            if prepared is None or not prepared.fits(tables):
                prepared = self.ia3_prepared = self._prepare(tables)
            if prepared is not None:
                return prepared.call(tables, x)  # type: ignore[no-any-return]
        weight, bias = dense_weight(self)
        if weight is not None:
            return ops.linear(*autocast(x, weight, bias), *self._vectors(tables))  # type: ignore[no-any-return]
        quantised = quantised_weight(self)
        return None if quantised is None else self._fused_quantised(x, quantised, tables)

    def _prepare(self, tables: MixTables) -> Prepared | None:
        weight, bias = dense_weight(self)
        if weight is None or not has_parameters(self):
            return None
        l_in, l_out, _, _ = self._vectors(tables)
        return Prepared(tables, (self,), ops.linear, weight=weight, bias=bias, l_in=l_in, l_out=l_out)

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
            config = plan(
                x, widths[1], quantised.kind, quantised.group_size, self._per_row(rows), quantised.groups is not None
            )
            where = "the vector is in the epilogue" if side == "out" else "x is scaled in a pass before"
            if config is None:
                why = f"{quantised.kind} is dequantised in a pass before; the vector has a pass of its own"
                return How("linear_quantised", "torch", why)
            why = f"{quantised.kind} is dequantised in registers; {where}"
            return How("linear_quantised", config.in_words(), why)
        if weight is None:
            return How("multiplication", "", "the module runs as it is: no kernel reads a weight of its kind")
        if ops.backend(weight) == "torch":
            return How("multiplication", "", f"no kernel computes in {weight.dtype}")
        from ia3rt.kernels.linear_plan import explain  # not before: Triton may not be installed

        x = weight.new_empty(rows, weight.shape[1])
        paired = side == "out" and self.ia3_pair is not None and self.ia3_pair.in_order
        config, why = explain(x, weight, side, self._per_row(rows), 1 + paired)
        return How("linear_pair" if paired else "linear", config, why)

    def _per_row(self, rows: int) -> bool:
        from ia3rt.kernels.mixes import Routing  # not before: Triton may not be installed

        tables = self.ia3_routing.now().tables
        return bool(Routing.of(tables.mixes, tables.route, rows).per_row)

    def _fused_quantised(self, x: Tensor, weight: Quantised, tables: MixTables) -> Tensor:
        stored, (x, bias) = weight[:4], autocast(x, getattr(self, "bias", None))  # type: ignore[assignment]
        return ops.linear_quantised(  # type: ignore[no-any-return]
            x, *stored, bias, *self._vectors(tables), weight.kind, weight.group_size
        )

    def _vectors(self, tables: MixTables) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """What the kernels read of the bank for input and output, the mixes, and the route."""
        l_in = None if self.ia3_in is None else tables.bank[self.ia3_in]
        l_out = None if self.ia3_out is None else tables.bank[self.ia3_out]
        return l_in, l_out, tables.mixes, tables.route
