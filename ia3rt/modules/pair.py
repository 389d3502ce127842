"""The key and the value projection in one launch: they read the same x, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ia3rt import ops
from ia3rt.modules.autocast import autocast
from ia3rt.modules.layer import IA3Layer
from ia3rt.modules.prepared import Prepared, can_prepare, has_parameters
from ia3rt.modules.weights import dense_weight
from ia3rt.routing.tables import MixTables

_NAMES = (("k_proj", "v_proj"), ("k", "v"), ("key", "value"))


class _Ahead(NamedTuple):
    """The second layer's result, computed with the first's, and the input that it is for."""

    y: Tensor
    x: Tensor
    version: int | None


class Pair:
    """Two output-scaled layers: the first to be called computes for both, and the second takes its part.

    Where the second is called first, or not at all, or with another x, each layer computes for itself.

    Attributes:
        in_order: whether the second layer has come for its part each time.
    """

    def __init__(self, first: IA3Layer, second: IA3Layer) -> None:
        self._first = first
        self._second = second
        self._prepared: Prepared | None = None
        self.in_order = True
        self._traced: dict[object, object] = {}  # a compiler's forward: what it computes is of no thread

    def forward(self, layer: IA3Layer, x: Tensor, tables: MixTables) -> Tensor | None:
        """The result of `layer`, one of the two, for x; None where it has to compute that itself."""
        if torch.compiler.is_compiling():
            ahead = self._traced
        else:
            forward = layer.ia3_routing.forward()
            if forward is None:
                return None  # nobody may come for the other part
            ahead = forward.ahead
        waiting = cast("_Ahead | None", ahead.pop(self, None))
        if layer is self._second:
            fits = waiting is not None and waiting.x is x and waiting.version == _version(x)
            return waiting.y if waiting is not None and fits else None
        if waiting is not None:
            self.in_order = False  # nobody came for it: computing ahead is in vain in this model
        # Pruning and parametrizations make a weight for each call of their layer: not one to compute with ahead of it.
        if not self.in_order or not (has_parameters(self._first) and has_parameters(self._second)):
            return None
        y, y_second = self._compute(x, tables)
        ahead[self] = _Ahead(y_second, x, _version(x))
        return y

    def _compute(self, x: Tensor, tables: MixTables) -> tuple[Tensor, Tensor]:
        layers = (self._first, self._second)
        if can_prepare(tables):
            prepared = self._prepared
            if prepared is None or not prepared.fits(tables):
                (weight_a, bias_a), (weight_b, bias_b) = map(dense_weight, layers)
                l_a, l_b = self._vectors(tables)
                operands = dict(weight_a=weight_a, bias_a=bias_a, l_a=l_a, weight_b=weight_b, bias_b=bias_b, l_b=l_b)
                prepared = self._prepared = Prepared(tables, layers, ops.linear_pair, **operands)
            return prepared.call(tables, x)  # type: ignore[no-any-return]
        arguments: list[Tensor | None] = []
        for layer, vector in zip(layers, self._vectors(tables), strict=True):
            _, *matrix = autocast(x, *dense_weight(layer))
            arguments += [*matrix, vector]
        y, y_second = ops.linear_pair(*autocast(x), *arguments, tables.mixes, tables.route)
        return y, y_second

    def _vectors(self, tables: MixTables) -> tuple[Tensor, Tensor]:
        first, second = self._first.ia3_out, self._second.ia3_out
        assert first is not None and second is not None
        return tables.bank[first], tables.bank[second]


def _version(x: Tensor) -> int | None:
    """What tells whether x was changed in place meanwhile, where that is kept track of."""
    if torch.compiler.is_compiling() or x.is_inference():
        return None  # one graph holds both calls, and would be compiled anew for each version
    return x._version


def pair_layers(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> None:
    """Pairs the layers at `paths` that stand side by side as key and value projections; unpairs what no longer fits."""
    for path in paths:
        layer = modules[path]
        parent, _, name = path.rpartition(".")
        for first, second in _NAMES:
            if name == first and isinstance(layer, IA3Layer):
                other = modules.get(f"{parent}.{second}" if parent else second)
                pair = Pair(layer, other) if isinstance(other, IA3Layer) and _fit(layer, other) else None
                for each in (layer, other):
                    if isinstance(each, IA3Layer):
                        vars(each)["ia3_pair"] = pair


def _fit(first: IA3Layer, second: IA3Layer) -> bool:
    weights = [dense_weight(layer)[0] for layer in (first, second)]
    if any(weight is None for weight in weights):
        return False
    if first.ia3_out is None or second.ia3_out is None or first.ia3_in is not None or second.ia3_in is not None:
        return False
    places = first.ia3_routing.bank.places
    are_together = places[first.ia3_out] == places[second.ia3_out]  # on one device
    return are_together and weights[0].shape[1] == weights[1].shape[1]  # type: ignore[union-attr]
