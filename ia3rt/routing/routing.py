"""What the rows of a model's forwards wear: set for all or for a context, and bound to each forward as it begins."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from ia3rt.adapters.adapter import Adapter
from ia3rt.adapters.bank import Bank
from ia3rt.adapters.mix import BASE
from ia3rt.adapters.outside_modes import outside_modes
from ia3rt.routing.context import Context
from ia3rt.routing.forward import Forward
from ia3rt.routing.forwards import Forwards
from ia3rt.routing.guard import Guard
from ia3rt.routing.past import PastForwards, is_checkpointing
from ia3rt.routing.probing import Probing
from ia3rt.routing.route import Backend, Route
from ia3rt.routing.rows import RowScales
from ia3rt.routing.traced import is_recorded, is_traced
from ia3rt.routing.training import TrainedAdapters
from ia3rt.routing.wearing import Wearing
from ia3rt.routing.worn import Shelf, Worn

_current_task = torch._C._current_graph_task_id
_keys = itertools.count()
_routings: dict[int, weakref.ref[Routing]] = {}


def routing_of(key: int) -> Routing:
    """The Routing of a model, as its drop-ins ask for it where a compiler reads them.

    Compiled code checks at each call that what it found in two places to be one object still is, in Python: for a
    drop-in's own reference that took as long as all else that it checks of a layer. Here it finds it in one place.
    """
    routing = _routings[key]()
    assert routing is not None  # a drop-in holds it
    return routing


class Routing:
    """Shared by all patched modules of a model, which ask it at each call what they wear: `now`.

    Attributes:
        bank: the adapters.
        backend: `triton` where the kernels evaluate the mixes, `torch` where they are composed once, when set.
        fuses_gate_up: whether MLPs have their first matrices and their activation in one launch.
        trained: the adapters in training, if any.
        probing: how the model lays out its rows.
        rows: scales for rows that wear different mixes.
        settle: brings what is worn to where layers are that were moved to other devices since.
        guard: what sees to it that a forward reaches the layers that wear vectors, if there are any.
        key: by which drop-ins find it where a compiler reads them.
        forwards: those of the model, to which what is worn is bound.
        context: what this thread or task wears, and which forward it is in.
        past: what was worn in forwards that a backward pass computes again.
    """

    key: int
    forwards: Forwards

    def __new__(cls, *args: object) -> Routing:
        """One that drop-ins and hooks find already while it is copied, as they are copied meanwhile."""
        made = object.__new__(cls)
        made.key = key = next(_keys)
        made.forwards = Forwards(made)
        _routings[key] = weakref.ref(made, lambda _: _routings.pop(key, None))
        return made

    def __init__(self, bank: Bank, backend: Backend, fuses_gate_up: bool) -> None:
        self.bank = bank
        self.backend: Backend = backend
        self.fuses_gate_up = fuses_gate_up
        self.trained: TrainedAdapters | None = None
        self.guard: Guard | None = None
        self.settle: Callable[[], object] = bank.settle
        self._covering: Wearing | None = None
        self._merging: Wearing | None = None
        self.probing = Probing(bank)
        self.lock = bank.lock  # of all that changes the bank or what is worn
        self._shelf = Shelf(bank, backend)
        self.past = PastForwards()
        bank.release = self.past.forget
        self._begin()
        self.rows = RowScales(bank, self.probing, self._shelf, self.forward)

    def attach(self, model: nn.Module) -> None:
        """Says which model this is of."""
        self._model = weakref.ref(model)
        self.forwards.attach(model)

    def _begin(self) -> None:
        base = Wearing(self._shelf.lay(Route((self.bank.resolve(BASE),))))
        self.context = Context(base)
        self._wearings: weakref.WeakSet[Wearing] = weakref.WeakSet([base])

    @property
    def composes(self) -> bool:
        """Whether any module needs composed mixes: on the torch backend all do, else those that no kernel fits."""
        return self._shelf.composes

    @composes.setter
    def composes(self, composes: bool) -> None:
        self._shelf.composes = composes

    @property
    def route(self) -> Route:
        """What the next forward of this context wears."""
        return self.here().route

    @property
    def chosen(self) -> Route:
        """The same as if no adapters were in the weights."""
        return self.context.wearing.worn.route

    @property
    def is_entered(self) -> bool:
        """Whether this context wears something of its own, of which other threads know nothing."""
        return self.context.wearing is not self.context.everywhere

    def traced(self) -> Worn:
        """`now` where a compiler reads it, and `now_on`: composed mixes are found by position, wherever they lie.

        Raises:
            RuntimeError: it cannot be told.
        """
        if torch.compiler.is_exporting():
            self.forwards.record()
        held = self.context.local.held.worn
        worn = self._found if held is None else held
        if self.backend == "triton" and not worn.is_left_to_compiler and len(self.bank.tables) > 1:
            raise RuntimeError(
                "the model's sites lie on several devices, and a part of it is compiled by itself, where the "
                "kernels can read one device only: compile the whole model, call it uncompiled, or "
                "patch(model, backend='torch')"
            )
        return worn

    def now(self) -> Worn:
        """What a layer wears that is called now; `traced` where a compiler reads along."""
        forward = self.context.forward()
        if forward is not None and forward.task == _current_task():
            return forward.worn
        return self._outside()

    @property
    def _found(self) -> Worn:
        """What compiled code finds that this context wears."""
        return self.context.now.wearing.worn if self._covering is None else self._covering.worn

    def now_on(self, place: int) -> Worn:
        """The same for a layer on one of several devices, as that reads it.

        Args:
            place: of the device, among the bank's tables.
        """
        forward = self.context.forward()
        if forward is not None and forward.task == _current_task():
            if forward.placed is None:
                forward.placed = [forward.worn.on(each) for each in range(len(forward.worn.placed))]
            return forward.placed[place]
        return self._outside().on(place)

    def forward(self) -> Forward | None:
        """The forward that this context is in."""
        return None if is_traced() else self.context.forward()

    @outside_modes
    def lay(self, route: Route) -> Worn:
        """What rows wear by `route`; gradients of it reach the vectors that are trained."""
        worn = self._laid(route)
        if route.start is not None:
            worn.before_start, worn.after_start = self._laid(route.before_start), self._laid(route.after_start)
            worn.after_start.is_behind = True
        return worn

    def _laid(self, route: Route) -> Worn:
        if self.trained is not None and self.trained.are_worn(route.mixes):
            return self.trained.worn(route, self.backend)
        return self._shelf.lay(route)

    def wear_everywhere(self, route: Route) -> None:
        """Makes `route` what all contexts wear that have nothing of their own, and this one too."""
        self.forwards.leave_ended(sys._getframe())
        own, worn = self.context.wearing, self.lay(route)
        self._replace(self.context.everywhere, worn)
        if own is not self.context.everywhere:
            if own.holds:
                self._replace(own, worn)
            else:
                self.context.wear(self.context.everywhere)

    def wear_here(self, route: Route, images: Sequence[int] | None = None) -> Wearing:
        """Makes `route` what this context wears; gives what it wore before."""
        self.forwards.leave_ended(sys._getframe())
        before = self.context.wearing
        with self.lock:
            self._check_captured(route)
            worn = self.lay(route)
            worn.images = images
            own = Wearing(worn)
            self._wearings.add(own)
        self.context.wear(own)
        return before

    def pin(self) -> Wearing:
        """Lets this context wear on what it wears, whatever is set elsewhere; gives what it wore."""
        before = self.context.wearing
        if self._covering is not None:
            return before
        with self.lock:
            own = Wearing(before.worn)
            own.holds = own.generates = True
            self._wearings.add(own)
        self.context.wear(own)
        return before

    def wear_pinned(self, route: Route) -> None:
        """Makes `route` what this context wears that was pinned."""
        wearing = self.context.wearing
        with self.lock:  # or a load that lays everything anew would put back what was worn before
            self._replace(wearing, self.lay(route))

    def hold(self) -> Forward | None:
        """Says that what this context wears is the content of a `with`; gives the forward that this is within.

        That wears on what it began with. What is called in the `with` is no part of it, or it would be worn nowhere.
        """
        wearing, within = self.context.wearing, self.context.suspend()
        wearing.holds, wearing.task = True, _current_task()
        is_inside = within is not None and is_checkpointing(sys._getframe())
        wearing.is_repeated = is_inside or wearing.task != -1
        return within

    def wear_again(self, before: Wearing, within: Forward | None = None, stacklevel: int = 4) -> None:
        """Makes this context wear what it wore; rows whose adapters are gone since wear the base, with a warning.

        Args:
            before: what that was.
            within: the forward that goes on now.
            stacklevel: whose line the warning names.
        """
        self.forwards.leave_ended(sys._getframe())
        route = before.worn.route
        gone = {adapter for mix in route.mixes for adapter in mix.adapters if adapter.is_deleted}
        if gone:
            with self.lock:
                self._replace(before, self.lay(self._without(route, gone)))
        self.context.wear(before)
        if within is not None and self.context.resume(within):
            self.past.begin(within.worn)
        for adapter in gone:  # last, as a warning may be an error
            warnings.warn(
                f"adapter {adapter.name!r} was deleted meanwhile: the rows that wore it wear the base model now",
                stacklevel=stacklevel,
            )

    def cover(self) -> None:
        """Lets nothing be worn, as adapters are in the weights now, until `uncover`."""
        self.forwards.leave_ended(sys._getframe())
        self._covering = Wearing(self.lay(Route((self.bank.resolve(BASE),))))
        self._merging = self.context.wearing

    def uncover(self) -> None:
        """Ends what `cover` began."""
        self._covering = self._merging = None

    def drop(self, adapter: Adapter) -> bool:
        """Puts the rows that wear `adapter` back to the base model, others stay as they are; says if there were any."""
        worn_now = False
        for wearing in {self.context.everywhere, self.context.wearing}:
            route = wearing.worn.route
            if any(adapter in mix.adapters for mix in route.mixes):
                worn_now = True
                self._replace(wearing, self.lay(self._without(route, {adapter})))
        return worn_now

    def _again(self, worn: Worn) -> Worn:
        """The same, laid anew."""
        laid = self.lay(worn.route)
        if worn.tokens is not None and worn.length is not None:
            laid = laid.by_token(worn.tokens, worn.length, self.bank)
        laid = laid if worn.images is None else laid.with_images(worn.images)
        laid.is_behind = worn.is_behind
        return laid

    def rebind(self) -> None:
        """Lays what the forwards wear anew that this context is in: accelerate moves a model when it is called."""
        forward = self.context.forward()
        while forward is not None:
            forward.worn = forward.wearing.worn = self._again(forward.worn)
            forward.placed = None
            forward = forward.outer

    def refresh(self) -> None:
        """Lays everything anew, after the bank's table was replaced or training began or ended."""
        with self.lock:
            for wearing in [*self._wearings, *filter(None, [self._covering])]:
                worn = self.lay(wearing.worn.route)
                worn.images = wearing.worn.images
                self._replace(wearing, worn)

    def compose(self) -> None:
        """Has composed what this thread wears, now and at each switch from now on."""
        if not (self.composes and self._found.composed.is_written):
            self.composes = True
            self.refresh()

    @outside_modes
    def record(self) -> None:
        """Lets a program that is exported now keep what this thread wears, composed."""
        held = self.context.local.held.worn
        worn = self._found if held is None else held
        worn.compose(self.bank)
        (worn.of or worn).lent = True

    def leave_graphs(self) -> None:
        """Says, after the bank's table was replaced, that what a CUDA graph captured is no more what is worn."""
        if self.context.forget_captured():
            warnings.warn(
                "the bank is another table now, as an adapter needed room or acts at other sites, or the model was "
                "moved: CUDA graphs that were captured before read the one of then and must not be replayed. Capture "
                "them again; patch(capacity=…, grow=False) keeps the bank where it is",
                stacklevel=5,
            )

    def capture(self, worn: Worn) -> Worn:
        """`worn` for a forward that a CUDA graph captures: in memory that each switch of this context writes."""
        if len(self.bank.tables) > 1:
            devices = sorted(str(table.device) for table in self.bank.tables)
            raise RuntimeError(f"the model's sites lie on several devices, {devices}, and a CUDA graph is of one")
        whole = worn.of or worn
        if worn is self.context.wearing.worn:
            written = self.context.captured(worn.rows)
            if written is not None and written is not worn.memory:
                return worn.within(written)
        memory = whole.lend()
        if memory is not None:
            self.context.capture(whole.rows, memory)
        return worn

    def here(self) -> Worn:
        """What a forward wears that begins now in this context."""
        wearing = self.context.wearing
        if self._covering is None:
            return wearing.worn
        if wearing is not self.context.everywhere and wearing is not self._merging:
            raise RuntimeError(
                "adapters are merged into the weights, so that what this thread's route says cannot be worn: call "
                "unmerge_adapter() first"
            )
        return self._covering.worn

    def _outside(self) -> Worn:
        """What a layer wears that is called outside of any forward, or again for a gradient."""
        if not self.bank.is_settled:
            self.settle()
        again = self.again()
        return self.bound(self.here() if again is None else again)

    def again(self) -> Worn | None:
        """What was worn in the forward that a backward pass computes again; None where it computes none.

        A `with` that is entered in what is computed again was entered there the first time, too: it says what is worn.

        Raises:
            RuntimeError: it is not known.
        """
        task = _current_task()
        return None if task == -1 or self.context.wearing.task == task else self.past.find()

    def bound(self, worn: Worn) -> Worn:
        """`worn` as a forward that begins now may hold it."""
        if self.trained is not None and self.trained.is_replaced():
            self.trained.adopt()
            if not self.trained.is_replaced():
                self.refresh()
            worn = self._again(worn)
        if self.bank.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                worn = self.capture(worn)
            else:
                worn.order(self.bank)
        if is_recorded():
            worn = worn.recorded(self.bank)
        elif torch.is_grad_enabled():
            worn = worn.kept(self.bank)
        if not self.context.wearing.is_repeated:
            self.past.begin(worn)
        return worn

    def _check_captured(self, route: Route) -> None:
        if route.start is not None and self.context.captured(len(route.start)) is not None:
            raise ValueError(
                f"a CUDA graph of {len(route.start)} rows was captured here, and does not know at which tokens it is "
                "replayed: enter a route without start for what it computes, and the start in another thread"
            )

    def _replace(self, wearing: Wearing, worn: Worn) -> None:
        wearing.worn = worn
        self.context.rewrite(wearing)

    def _without(self, route: Route, gone: set[Adapter]) -> Route:
        base = self.bank.resolve(BASE)
        mixes = tuple(mix if gone.isdisjoint(mix.adapters) else base for mix in route.mixes)
        return dataclasses.replace(route, mixes=mixes)

    def is_copied(self, memo: dict[int, Any]) -> bool:
        """Whether a deep copy that is being made has the whole model."""
        model = self._model()
        return model is not None and id(model) in memo

    def leave_out(self, memo: dict[int, Any]) -> None:
        """Says that a deep copy has a plain copy of a part of the model, before it has the model."""
        memo[~self.key] = self  # no object's address

    def release(self) -> None:
        """Leaves nothing in this context."""
        self.context.wear(self.context.everywhere)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Says what pickle cannot do."""
        raise TypeError(
            "a model that ia3rt patched cannot be pickled: save_pretrained() or state_dict() its weights and "
            "save_adapter() its adapters, or unpatch() it first"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Routing:
        """One for a copied model: over a copy of the bank, worn as it is here. None of its own for a part of one.

        Raises:
            ValueError: parts of the model were copied before it, and are plain.
        """
        if not self.is_copied(memo):
            return self
        if ~self.key in memo:
            raise ValueError(
                "a part of a patched model is copied before the model itself, so that it would be a plain one in the "
                "copy, and wear no adapters: copy the model first, memo = {}; copy.deepcopy(model, memo), and then "
                "what holds it, copy.deepcopy(…, memo); or unpatch() it before"
            )
        made = memo[id(self)] = Routing.__new__(Routing)
        with self.lock:  # what is worn is of the adapters that are copied
            made.__init__(copy.deepcopy(self.bank, memo), self.backend, self.fuses_gate_up)  # type: ignore[misc]
            made.composes = self.composes
            made.guard = copy.deepcopy(self.guard, memo)
            made.settle = copy.deepcopy(self.settle, memo)
            made.trained = copy.deepcopy(self.trained, memo)
            made.wear_everywhere(copy.deepcopy(self.chosen, memo))
            if self._covering is not None:
                made.cover()
        model = self._model()
        if model is not None:
            made.attach(memo.get(id(model), model))
        return made
