"""The drop-in of a linear layer: the module that it was, with its input and output scaled."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import islice
from typing import Any, ClassVar, Protocol, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from ia3rt import ops
from ia3rt.adapters.site import Side
from ia3rt.modules import eager
from ia3rt.modules.autocast import autocast
from ia3rt.modules.bare import is_bare, own_forward
from ia3rt.modules.prepared import Prepared, can_prepare, has_parameters
from ia3rt.modules.sites import module_widths
from ia3rt.modules.wearer import How, Wearer, computing_tensor, original_class
from ia3rt.modules.weights import dense_weight, quantised_weight
from ia3rt.routing.routing import routing_of
from ia3rt.routing.tables import MixTables
from ia3rt.routing.traced import is_recorded
from ia3rt.routing.worn import Worn

_Positions: TypeAlias = "tuple[int | None, int | None]"
"""Of the vectors at a layer's input and output in the bank; None where none acts."""


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
    """A linear layer whose input and output are scaled, whoever calls it.

    Attributes:
        ia3_pair: what computes this layer and another in one launch, on the Triton backend; None where it is alone.
        ia3_prepared: what it launches, on the Triton backend, as long as its weight and the bank stay; by the positions
            of the vectors that are applied.
        ia3_own: what computes as the original class's forward does, past it, with a result that may be overwritten.
        ia3_input: how that forward calls its input.
        ia3_is_dense: whether its weight was a matrix when it was patched, which a compiler multiplies by.
    """

    ia3_pair: JointLaunch | None = None
    ia3_prepared: dict[_Positions, Prepared | None]
    ia3_own: ClassVar[Callable[[nn.Module, Tensor], Tensor | None] | None]
    ia3_input: ClassVar[str]
    ia3_is_dense: bool

    def __init_subclass__(cls) -> None:
        """Looks at the original class once, when the drop-in class is made."""
        super().__init_subclass__()
        original: Any = original_class(cls)
        cls.ia3_own = own_forward(original)
        if original is nn.Linear:
            cls.ia3_unscaled = _torchs  # type: ignore[method-assign]
        cls.ia3_input = next(islice(inspect.signature(original.forward).parameters, 1, None), "input")

    def ia3_begin(self) -> None:
        """Sees whether a kernel could read its weight as it is: compiled code would look at each call."""
        vars(self)["ia3_is_dense"] = dense_weight(self)[0] is not None

    def forward(self, x: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """s_out ∘ layer(s_in ∘ x); the layer's bias is scaled too (Liu et al. 2022)."""
        if x is None:
            x = kwargs.pop(self.ia3_input)
        worn = self.ia3_worn()
        if args or kwargs:  # of a layer with more to it: by its own forward alone
            return self.ia3_forward(worn, self.ia3_in, self.ia3_out, x, (args, kwargs))
        return self.ia3_forward(worn, self.ia3_in, self.ia3_out, x)

    def ia3_forward(
        self,
        worn: Worn,
        l_in: int | None,
        l_out: int | None,
        x: Tensor,
        rest: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    ) -> Tensor:
        """`forward` with the vectors at these positions: who applies the other itself says None for it."""
        if x.is_nested:
            return self._by_padding(worn, l_in, l_out, x)
        is_left = worn.is_left_to_compiler and self._is_left()  # whatever is looked at then is checked at each call
        is_worn = rest is None and not is_left and (l_in is not None or l_out is not None)
        if is_worn and self.ia3_routing.backend == "triton":
            fused = self._by_kernel(worn, (l_in, l_out), x)
            if fused is not None:
                return fused
        if l_in is not None:
            s_in = self.ia3_scale(l_in, x, worn)
            x = x if s_in is None else eager.scaled(x, s_in)
        own = None if is_left or rest is not None else type(self).ia3_own
        if own is not None:
            y = own(self, x)
            if y is not None:  # ours to write on
                s_out = None if l_out is None else self.ia3_scale(l_out, y, worn)
                return y if s_out is None else eager.scaled_own(y, s_out)
        args, kwargs = rest or ((), {})
        y = self.ia3_unscaled(x) if is_left and rest is None else super().forward(x, *args, **kwargs)
        if not isinstance(y, Tensor):
            return self._not_scaled(worn, l_out, y)  # type: ignore[no-any-return]
        s_out = None if l_out is None else self.ia3_scale(l_out, y, worn)
        if s_out is None:
            return y
        if s_out.shape[-1] not in (1, y.shape[-1]):  # of a convolution it is 1
            raise ValueError(
                f"a {type(self).ia3_original.__name__} gave a tensor {tuple(y.shape)}, and its vector has width "
                f"{s_out.shape[-1]}: leave the module out with patch(exclude_modules=…)"
            )
        return eager.scaled(y, s_out)

    def ia3_unscaled(self, x: Tensor) -> Tensor:
        """What the layer's own forward gives for x: a method of ours, which compiled code does not look up again."""
        return super().forward(x)  # type: ignore[no-any-return]

    def _is_left(self) -> bool:
        """Whether a compiler multiplies by the vectors: where it also compiles what multiplies by the weight.

        A program that is recorded does so everywhere.
        """
        return self.ia3_is_dense or is_recorded() or routing_of(self.ia3_key).backend == "torch"

    def _not_scaled(self, worn: Worn, l_out: int | None, y: Any) -> Any:
        """What is no tensor, as a layer gives that only code could tell of, where no adapter is worn.

        Raises:
            ValueError: one is, and its vector acts here.
        """
        if l_out is not None and any(mix.adapters for mix in worn.route.mixes):
            raise ValueError(
                f"a {type(self).ia3_original.__name__} gave a {type(y).__name__}, and its vector scales one tensor: "
                "leave the module out with patch(exclude_modules=…)"
            )
        return y

    def _by_padding(self, worn: Worn, l_in: int | None, l_out: int | None, x: Tensor) -> Tensor:
        """The result for a nested tensor, as nn.TransformerEncoder makes of padded rows: there a scale has no place."""
        lengths = [len(row) for row in x.unbind()]
        y = self.ia3_forward(worn, l_in, l_out, x.to_padded_tensor(0.0))
        return torch.nested.as_nested_tensor([row[:length] for row, length in zip(y, lengths, strict=True)])

    def _by_kernel(self, worn: Worn, positions: _Positions, x: Tensor) -> Tensor | None:
        """The result by the Triton backend; None where no kernel fits."""
        if worn.by_row and not all(
            position is None or self.ia3_is_row_major(position, x, worn) for position in positions
        ):
            return None
        tables = worn.tables
        if self.ia3_pair is not None:
            y = self.ia3_pair.forward(self, x, tables)
            if y is not None:
                return y
        if can_prepare(tables):
            prepared = self.ia3_prepared.get(positions)
            if prepared is None or not prepared.fits(tables):
                prepared = self.ia3_prepared[positions] = self._prepare(tables, positions)
            if prepared is not None:
                return prepared.call(tables, x)  # type: ignore[no-any-return]
        vectors = (None if position is None else tables.bank[position] for position in positions)
        mixed = *vectors, tables.mixes, tables.route
        weight, bias = dense_weight(self)
        if weight is not None:
            return ops.linear(*autocast(x, weight, bias), *mixed)  # type: ignore[no-any-return]
        quantised = quantised_weight(self)
        if quantised is None:
            return None
        x, bias = autocast(x, getattr(self, "bias", None))  # type: ignore[assignment]
        return ops.linear_quantised(  # type: ignore[no-any-return]
            x, *quantised[:4], bias, *mixed, quantised.kind, quantised.group_size
        )

    def _prepare(self, tables: MixTables, positions: _Positions) -> Prepared | None:
        weight, bias = dense_weight(self)
        if weight is None or not has_parameters(self):
            return None
        l_in, l_out = (None if position is None else tables.bank[position] for position in positions)
        return Prepared(tables, (self,), ops.linear, weight=weight, bias=bias, l_in=l_in, l_out=l_out)

    @classmethod
    def is_fused(cls, module: nn.Module) -> bool:
        """Whether its weight is one that the kernels read."""
        return dense_weight(module)[0] is not None or quantised_weight(module) is not None

    def ia3_hows(self, rows: int) -> dict[int, How]:
        """As `forward` chooses."""
        sides: tuple[tuple[Side, int | None], ...] = (("in", self.ia3_in), ("out", self.ia3_out))
        return {position: self._how(side, rows) for side, position in sides if position is not None}

    def _how(self, side: Side, rows: int) -> How:
        if self.ia3_routing.backend == "torch":
            ours = type(self).ia3_own is not None and type(self._parameters.get("weight")) is nn.Parameter
            where = "in a copy of its input" if side == "in" else f"in {'place in' if ours else 'a copy of'} its output"
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

        tables = self.ia3_now().tables
        return bool(Routing.of(tables.mixes, tables.route, rows).per_row)


def _torchs(self: nn.Module, x: Tensor) -> Tensor:
    return nn.Linear.forward(self, x)  # type: ignore[arg-type]


def is_as_patched(layer: nn.Module | None) -> TypeGuard[IA3Layer]:
    """Whether `layer` is a drop-in and calling it is calling our forward, so that another may do what it does."""
    return getattr(type(layer), "forward", None) is IA3Layer.forward and is_bare(layer)  # type: ignore[arg-type]
