"""Which mix each row or token of the batch wears, and whether the batch at hand agrees with it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ia3rt.adapters.bank import Adapter, Bank, ResolvedMix
from ia3rt.adapters.inference_mode import outside_inference_mode
from ia3rt.adapters.mix import BASE
from ia3rt.routing.composed import ComposedMixes
from ia3rt.routing.tables import MixTables, pack_mixes, used_rows
from ia3rt.routing.training import TrainedAdapters

Backend: TypeAlias = Literal["torch", "triton"]


@dataclass(frozen=True, eq=False)
class Route:
    """What a batch wears.

    Attributes:
        mixes: the distinct mixes in use.
        index: int64 on the CPU, [rows] or [rows, tokens]: the mix of each row or token; None where all rows of any
            batch wear `mixes[0]`.
    """

    mixes: tuple[ResolvedMix, ...]
    index: Tensor | None = None

    @classmethod
    def by_row(cls, mixes: Sequence[ResolvedMix]) -> Route:
        """One mix a row; rows that wear the same one share it."""
        slots: dict[tuple[object, ...], int] = {}
        distinct: list[ResolvedMix] = []
        index = []
        for mix in mixes:
            slot = slots.setdefault((mix.rows, mix.weights), len(distinct))
            if slot == len(distinct):
                distinct.append(mix)
            index.append(slot)
        return cls(tuple(distinct), torch.tensor(index))

    @property
    def by_token(self) -> bool:
        """Whether each token has a mix of its own."""
        return self.index is not None and self.index.dim() == 2


class Routing:
    """What the patched modules read during a forward: the one piece of state they share.

    Attributes:
        backend: `triton` where the kernels evaluate the mixes, `torch` where they are composed once, when set.
        fuses_gate_up: whether MLPs have their first matrices and their activation in one launch.
        route: what the batch wears.
        composes: whether any module needs `composed`: on the torch backend all do, else those that no kernel fits.
        composed: the mixes as the torch backend applies them.
        tables: the mixes as the kernels read them.
        tokens: int64 [rows * tokens], for the forward at hand: the mix of each token; None unless routed by token.
        expand: how many times `generate` repeats each row (beams, returned sequences); None outside of it.
        trained: the adapters in training, if any: each forward that wears one has `composed` and `tables` of its own,
            whose gradients reach the parameters.
    """

    def __init__(self, bank: Bank, backend: Backend, fuses_gate_up: bool) -> None:
        self.bank = bank
        self.backend: Backend = backend
        self.fuses_gate_up = fuses_gate_up
        self.composes = backend == "torch"
        self.route = Route((bank.resolve(BASE),))
        self.composed = self._composed = ComposedMixes()
        self.tables = self._tables = MixTables()
        self.tokens: Tensor | None = None
        self.expand: int | None = None
        self.trained: TrainedAdapters | None = None
        self._in_training: tuple[list[int], Tensor, Tensor | None] | None = None

    @outside_inference_mode
    def wear(self, route: Route) -> None:
        """Makes `route` what the next forward wears."""
        by_row = route.index if route.index is not None and not route.by_token else None
        self.composed, self.tables = self._composed, self._tables
        if self.composes:
            self.composed.write(self.bank, route.mixes, by_row)
        if self.backend == "triton":
            self.tables.write(self.bank, route.mixes, 1 if route.index is None else route.index.numel())
            self.tables.write_route([0] if by_row is None else by_row.tolist())
        self._in_training = None
        if self.trained is not None and self.trained.are_worn(route.mixes):
            used, mixes = used_rows(route.mixes)
            device = self.bank.table.device
            packed = pack_mixes(mixes, max(1, *(len(mix.rows) for mix in mixes))).to(device)
            self._in_training = used, packed, None if by_row is None else by_row.to(device)
        self.route = route
        self.after_forward()

    def refresh(self) -> None:
        """Writes the route anew, after the bank's table was replaced."""
        self.wear(self.route)

    def restore(self, route: Route) -> None:
        """Sets an earlier route again; rows whose adapters are gone since wear the base model, with a warning."""
        worn = {adapter for mix in route.mixes for adapter in mix.adapters}
        gone = {adapter for adapter in worn if self.bank.adapters.get(adapter.name) is not adapter}
        for adapter in gone:
            warnings.warn(
                f"adapter {adapter.name!r} was deleted meanwhile: the rows that wore it wear the base model now",
                stacklevel=4,
            )
        self.wear(self._without(route, gone))

    def drop(self, adapter: Adapter) -> None:
        """Puts the rows that wear `adapter` back to the base model, with a warning; others stay as they are."""
        if not any(adapter in mix.adapters for mix in self.route.mixes):
            return
        warnings.warn(
            f"adapter {adapter.name!r} was active and is deleted: the rows that wore it wear the base model now",
            stacklevel=3,
        )
        self.wear(self._without(self.route, {adapter}))

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pre-hook: checks the route's rows against the batch's, lays a route by token over its tokens.

        Raises:
            ValueError: they are not.
        """
        if self._in_training is not None:
            self._lay_trained()
        index = self.route.index
        if index is None:
            return
        batch = _batch(args, kwargs)
        if batch is None:
            return
        expand = self.expand or 1
        if batch.shape[0] not in (len(index), len(index) * expand):
            repeated = f" × {expand} sequences each" if expand > 1 else ""
            raise ValueError(
                f"the route has {len(index)} rows{repeated}, but the batch has {batch.shape[0]}: "
                "route() takes one mix for each row of the batch, set_adapter() one for all"
            )
        if index.dim() == 2:
            self._lay_tokens(index, batch, _cached(kwargs))

    def after_forward(self, *_: object) -> None:
        """A forward hook: a route by token fits the forward that it was laid over, and no other."""
        self.tokens = torch.empty(0, dtype=torch.int64) if self.route.by_token else None

    def _lay_trained(self) -> None:
        """Takes the vectors as the optimizer left them; new tensors, as a gradient may still need the last ones."""
        assert self.trained is not None and self._in_training is not None
        used, mixes, by_row = self._in_training
        rows = self.trained.rows(used)
        if self.composes:
            self.composed = ComposedMixes.over(rows, self.bank.widths, mixes, by_row)
        if self.backend == "triton":
            route = torch.zeros(1, dtype=torch.int32, device=rows.device) if by_row is None else by_row.int()
            self.tables = MixTables.over(rows, self.bank.widths, mixes, route)

    @outside_inference_mode
    def _lay_tokens(self, index: Tensor, batch: Tensor, past: int) -> None:
        length = batch.shape[1]
        if past == 0 and length != index.shape[1] and (self.expand is None or length < index.shape[1]):
            raise ValueError(f"the route has {index.shape[1]} tokens a row, but the batch has {length}")
        # What a row generates wears the mix of its last token.
        columns = torch.arange(past, past + length).clamp_(max=index.shape[1] - 1)
        rows = index[:, columns].repeat_interleave(batch.shape[0] // len(index), dim=0)
        self.tokens = rows.reshape(-1).to(self.bank.table.device)
        if self.backend == "triton":
            self.tables.lay_route(self.tokens)

    def _without(self, route: Route, gone: set[Adapter]) -> Route:
        base = self.bank.resolve(BASE)
        return Route(tuple(mix if gone.isdisjoint(mix.adapters) else base for mix in route.mixes), route.index)


def _batch(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The forward's main input, [batch, ...]."""
    names = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
    candidates = [*(kwargs.get(name) for name in names), *args, *kwargs.values()]
    return next((value for value in candidates if isinstance(value, Tensor) and value.dim() > 0), None)


def _cached(kwargs: Mapping[str, Any]) -> int:
    """How many tokens of each row the forward's key-value cache holds."""
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    return 0 if cache is None else int(cache.get_seq_length())
