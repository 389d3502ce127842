"""What a drop-in launches again and again: an op bound to its weights and vectors, as long as these stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ia3rt.ops import Bound, Callee
from ia3rt.routing.tables import MixTables


class Prepared:
    """An op bound to what a drop-in reads.

    Args:
        tables: whose bank the vectors are in.
        layers: the modules whose weights and biases are among `fixed`.
        op: what is launched.
        fixed: its arguments that stay, by name.

    Attributes:
        call: (tables, the op's other tensors) to its result.
        fixed: as given.
    """

    def __init__(self, tables: MixTables, layers: tuple[nn.Module, ...], op: Callee, **fixed: Any) -> None:
        self.call = Bound(op, **fixed).call
        self.fixed = fixed
        self._bank = tables.bank
        self._weights = tuple(map(_Weights, layers))

    def fits(self, tables: MixTables) -> bool:
        """Whether the bank and the weights are where they were, and as they were."""
        if tables.bank is not self._bank:
            return False
        for weights in self._weights:  # noqa: SIM110  (all() of a generator takes a microsecond)
            if not weights.are_the_same():
                return False
        return True

    def __deepcopy__(self, memo: object) -> None:
        """Nothing: a copy of the model has other weights and another bank, and prepares its own."""


class _Weights:
    """A layer's weight and bias. Casts and moves of a module keep the parameter and put other data into it.

    So does who transposes a square weight, or expands a bias: to other strides at the same place.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._parameters = layer._parameters
        self._weight, self._bias = self._parameters["weight"], self._parameters["bias"]
        assert self._weight is not None
        self._at, self._dtype, self._shape = self._weight.data_ptr(), self._weight.dtype, self._weight.shape
        self._stride = self._weight.stride()
        if self._bias is not None:
            self._bias_at, self._bias_stride = self._bias.data_ptr(), self._bias.stride()

    def are_the_same(self) -> bool:
        parameters, weight, bias = self._parameters, self._weight, self._bias
        return (
            parameters.get("weight") is weight
            and weight.data_ptr() == self._at  # type: ignore[union-attr]
            and weight.dtype is self._dtype  # type: ignore[union-attr]
            and weight.shape == self._shape  # type: ignore[union-attr]
            and weight.stride() == self._stride  # type: ignore[union-attr]
            and parameters.get("bias") is bias
            and (bias is None or (bias.data_ptr() == self._bias_at and bias.stride() == self._bias_stride))
        )


def has_parameters(layer: nn.Module) -> bool:
    """Whether its weight is a parameter: pruning and the like compute one for each forward, by a hook."""
    return layer._parameters.get("weight") is not None


def can_prepare(tables: MixTables) -> bool:
    """Whether a forward may launch what was prepared: not for a compiler, under autocast or in training."""
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return False
    return tables.stays
