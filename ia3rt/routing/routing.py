"""What the rows of a model's forwards wear: set for all or for a context, and bound to each forward as it begins."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ia3rt.adapters.adapter import Adapter
from ia3rt.adapters.bank import Bank
from ia3rt.adapters.mix import BASE
from ia3rt.adapters.outside_modes import outside_modes
from ia3rt.routing.batch import (
    Arguments,
    cached,
    has_text,
    is_media,
    is_text,
    main_input,
    named_arguments,
    parameter_names,
    takes_text,
    with_own_rows,
)
from ia3rt.routing.compiled import Compiled
from ia3rt.routing.context import Context
from ia3rt.routing.forward import Forward, Part
from ia3rt.routing.guard import Guard
from ia3rt.routing.images import images_of
from ia3rt.routing.past import PastForwards
from ia3rt.routing.probing import Probing
from ia3rt.routing.route import Backend, Route
from ia3rt.routing.rows import RowScales
from ia3rt.routing.start import check_one_sequence
from ia3rt.routing.traced import is_traced
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
    """

    key: int

    def __new__(cls, *args: object) -> Routing:
        """One that is found by its key already while it is copied, as its drop-ins are copied meanwhile."""
        made = object.__new__(cls)
        made.key = key = next(_keys)
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
        self._past = PastForwards()
        bank.release = self._past.forget
        self._begin()
        self.rows = RowScales(bank, self.probing, self._shelf, self.forward)

    def attach(self, model: nn.Module) -> None:
        """Says which model this is of."""
        self._model = weakref.ref(model)
        self._names = parameter_names(model)  # a compiler does not look them up
        self._compiled = Compiled(
            model, self.probing, lambda: self.route, lambda: self._leave_ended(sys._getframe(1)), self._compose
        )

    def _begin(self) -> None:
        base = Wearing(self._shelf.lay(Route((self.bank.resolve(BASE),))))
        self._context = Context(base)
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
        return self._here().route

    @property
    def chosen(self) -> Route:
        """The same as if no adapters were in the weights."""
        return self._context.wearing.worn.route

    @property
    def is_entered(self) -> bool:
        """Whether this context wears something of its own, of which other threads know nothing."""
        return self._context.wearing is not self._context.everywhere

    def traced(self) -> Worn:
        """`now` where a compiler reads it, and `now_on`: composed mixes are found by position, wherever they lie.

        Raises:
            RuntimeError: it cannot be told.
        """
        if self._context.has_tasks:
            raise RuntimeError(
                "a route was entered by a task of an event loop, and compiled code knows threads only: enter it in "
                "the thread that computes (a function for asyncio.to_thread), or call the model uncompiled"
            )
        held = self._context.local.held.worn
        worn = self._of_thread if held is None else held
        if self.backend == "triton" and not worn.is_left_to_compiler and len(self.bank.tables) > 1:
            raise RuntimeError(
                "the model's sites lie on several devices, and a part of it is compiled by itself, where the "
                "kernels can read one device only: compile the whole model, call it uncompiled, or "
                "patch(model, backend='torch')"
            )
        return worn

    def now(self) -> Worn:
        """What a layer wears that is called now; `traced` where a compiler reads along."""
        forward = self._context.forward()
        if forward is not None and forward.task == _current_task():
            return forward.worn
        return self._outside()

    @property
    def _of_thread(self) -> Worn:
        """What compiled code finds that this thread wears."""
        return self._context.local.wearing.worn if self._covering is None else self._covering.worn

    def now_on(self, place: int) -> Worn:
        """The same for a layer on one of several devices, as that reads it.

        Args:
            place: of the device, among the bank's tables.
        """
        forward = self._context.forward()
        if forward is not None and forward.task == _current_task():
            if forward.placed is None:
                forward.placed = [forward.worn.on(each) for each in range(len(forward.worn.placed))]
            return forward.placed[place]
        return self._outside().on(place)

    def forward(self) -> Forward | None:
        """The forward that this context is in."""
        return None if is_traced() else self._context.forward()

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
        self._leave_ended(sys._getframe())
        own, worn = self._context.wearing, self.lay(route)
        self._replace(self._context.everywhere, worn)
        if own is not self._context.everywhere:
            if own.holds:
                self._replace(own, worn)
            else:
                self._context.wear(self._context.everywhere)

    def wear_here(self, route: Route, images: Sequence[int] | None = None) -> Wearing:
        """Makes `route` what this context wears; gives what it wore before."""
        self._leave_ended(sys._getframe())
        before = self._context.wearing
        with self.lock:
            self._check_captured(route)
            worn = self.lay(route)
            worn.images = images
            own = Wearing(worn)
            self._wearings.add(own)
        self._context.wear(own)
        return before

    def pin(self) -> Wearing:
        """Lets this context wear on what it wears, whatever is set elsewhere; gives what it wore."""
        before = self._context.wearing
        if self._covering is not None:
            return before
        with self.lock:
            own = Wearing(before.worn)
            own.holds = own.generates = True
            self._wearings.add(own)
        self._context.wear(own)
        return before

    def wear_pinned(self, route: Route) -> None:
        """Makes `route` what this context wears that was pinned."""
        wearing = self._context.wearing
        with self.lock:  # or a load that lays everything anew would put back what was worn before
            self._replace(wearing, self.lay(route))

    def hold(self) -> None:
        """Says that what this context wears is the content of a `with`."""
        self._context.wearing.holds = True

    def wear_again(self, before: Wearing) -> None:
        """Makes this context wear what it wore; rows whose adapters are gone since wear the base, with a warning."""
        self._leave_ended(sys._getframe())
        route = before.worn.route
        gone = {adapter for mix in route.mixes for adapter in mix.adapters if adapter.is_deleted}
        for adapter in gone:
            warnings.warn(
                f"adapter {adapter.name!r} was deleted meanwhile: the rows that wore it wear the base model now",
                stacklevel=4,
            )
        if gone:
            with self.lock:
                self._replace(before, self.lay(self._without(route, gone)))
        self._context.wear(before)

    def cover(self) -> None:
        """Lets nothing be worn, as adapters are in the weights now, until `uncover`."""
        self._leave_ended(sys._getframe())
        self._covering = Wearing(self.lay(Route((self.bank.resolve(BASE),))))
        self._merging = self._context.wearing

    def uncover(self) -> None:
        """Ends what `cover` began."""
        self._covering = self._merging = None

    def drop(self, adapter: Adapter) -> None:
        """Puts the rows that wear `adapter` back to the base model, with a warning; others stay as they are."""
        worn_now = False
        for wearing in {self._context.everywhere, self._context.wearing}:
            route = wearing.worn.route
            if any(adapter in mix.adapters for mix in route.mixes):
                worn_now = True
                self._replace(wearing, self.lay(self._without(route, {adapter})))
        if worn_now:
            warnings.warn(
                f"adapter {adapter.name!r} was active and is deleted: the rows that wore it wear the base model now",
                stacklevel=3,
            )

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
        forward = self._context.forward()
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

    def _compose(self) -> None:
        if not (self.composes and self._of_thread.composed.is_written):
            self.composes = True
            self.refresh()

    def leave_graphs(self) -> None:
        """Says, after the bank's table was replaced, that what a CUDA graph captured is no more what is worn."""
        if self._context.forget_captured():
            warnings.warn(
                "the bank is another table now, as an adapter needed room or acts at other sites, or the model was "
                "moved: CUDA graphs that were captured before read the one of then and must not be replayed. Capture "
                "them again; patch(capacity=…, grow=False) keeps the bank where it is",
                stacklevel=5,
            )

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments | None:
        """A forward pre-hook of the model and of the models inside it: the first of them binds what is worn.

        Those inside may be called without it, as `generate` does.

        Returns:
            The arguments, where they are others than were given: a forward that is followed needs rows of its own.

        Raises:
            ValueError: the route's rows or tokens are not the batch's, or the forward would not reach a layer.
        """
        return self._start(model, args, kwargs, sys._getframe(2), is_compiled=False)  # past the hook

    def before_compiled(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The same where the forward that comes is compiled: what is followed in others cannot be followed in it.

        Raises:
            ValueError: as `before_forward`; or tokens wear mixes of their own.
        """
        self._start(model, args, kwargs, sys._getframe(2), is_compiled=True)  # past the hook

    def before_traced(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The same where a compiled function calls the model, so that a compiler reads this.

        Raises:
            ValueError: as `before_compiled`.
            RuntimeError: layers were moved.
        """
        if not self.bank.is_settled:
            raise RuntimeError(
                "layers were moved to other devices since the last forward: call the model once by itself, not "
                "compiled, so that their vectors follow"
            )
        if self.guard is not None:
            self.guard.traced(model)
        self._compiled.compose()
        self._context.local.held.worn = None
        worn = self.traced()
        self._context.local.held.worn = worn  # to the end: other threads may switch meanwhile
        if torch.is_grad_enabled():
            worn.lent = True  # which a backward pass reads
        self._check_compiled(worn)
        if worn.by_row:
            given = named_arguments(self._names, args, kwargs)
            self._check_rows(worn, main_input(given, model))
            self._compiled.see(_tensors(given), worn.is_of_one_row)

    def _check_compiled(self, worn: Worn) -> None:
        if worn.route.by_token:
            raise ValueError(
                "each token wears a mix of its own, which a compiled model cannot follow: call the model that was "
                "given to torch.compile (of generate(), disable_compile=True), or route rows"
            )

    def _start(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], caller: FrameType, is_compiled: bool
    ) -> Arguments | None:
        if not self.bank.is_settled:
            self.settle()
        self._leave_ended(caller)
        task, outer = _current_task(), self._context.forward()
        if outer is not None and outer.task == task:
            if outer.owner is model:
                outer.calls += 1
            return None
        if is_compiled:
            self._compose()
        watch = None
        if self.guard is not None:
            self.guard.check(is_compiled)
            watch = self.guard.watch(model, args, kwargs) if task == -1 and not is_compiled else None
        again = self._past.find() if task != -1 else None
        worn = self._here() if again is None else again
        if is_compiled:
            self._check_compiled(worn)
        is_by_row = again is None and worn.rows is not None
        if is_by_row:
            names = parameter_names(model)
            arguments = named_arguments(names, args, kwargs)
            batch, part = main_input(arguments, model), self._part(model, arguments)
            worn = self._over_batch(model, worn, arguments, batch, part)
            if is_compiled:
                self._compiled.run(_tensors(arguments), worn.is_of_one_row)
        forward = Forward(self._bound(worn), model, task, outer, caller)
        followed: Arguments | None = None
        if is_by_row and not is_compiled:
            self._lay_out(forward, part, batch)
            if self.probing.is_first(forward, model, arguments, batch):
                followed = with_own_rows(names, args, kwargs)
                self.probing.follow(forward, named_arguments(names, *followed))
        self._context.enter(forward)
        if watch is not None:
            forward.watch = watch
            watch.start()
        return followed

    def _part(self, model: nn.Module, arguments: Mapping[str, Any]) -> Part:
        """What of the whole model's forward one of `model` is."""
        whole = self._model()
        beside_text = whole is not None and whole is not model and takes_text(whole) and not has_text(arguments)
        return Part.IMAGES if beside_text and any(map(is_media, arguments)) else Part.WHOLE

    def _lay_out(self, forward: Forward, part: Part, batch: Tensor | None) -> None:
        """Says of a forward what its batch has."""
        worn, forward.part = forward.worn, part
        if part is Part.WHOLE and batch is not None and batch.dim() > 1:
            forward.tokens = batch.shape[1]
            if worn.is_behind and worn.rows is not None:
                forward.most = worn.rows * forward.tokens

    def begin_ahead(self, model: nn.Module, arguments: Mapping[str, Any], caller: FrameType) -> Forward | None:
        """Begins a part of a forward that comes before it, as `generate` has images seen: with the rows of its batch.

        Args:
            model: that the forward is of.
            arguments: of the whole forward.
            caller: a frame that runs until `end_ahead`.

        Returns:
            What `end_ahead` takes; None where all rows wear one mix, so that the parts bind it themselves.

        Raises:
            ValueError: the route's rows are not the batch's.
        """
        self._leave_ended(caller)
        worn = self._here()
        if worn.rows is None or self._context.forward() is not None:
            return None
        batch = main_input(arguments, model)
        over_batch = self._over_batch(model, worn, arguments, batch, Part.AHEAD)
        forward = Forward(self._bound(over_batch), model, -1, None, caller)
        self._lay_out(forward, Part.AHEAD, batch)
        if self.probing.is_first(forward, model, arguments, batch):
            self.probing.follow(forward, arguments)
        self._context.enter(forward)
        return forward

    def end_ahead(self, forward: Forward | None, completed: bool) -> None:
        """Ends what `begin_ahead` began."""
        if forward is not None:
            self.probing.end(forward, completed)
            self._context.leave(forward)

    def after_traced(self, model: nn.Module, args: object, output: object) -> None:
        """A forward hook, where a compiler reads it."""
        self._context.local.held.worn = None

    def after_forward(self, model: nn.Module, args: object, output: object) -> None:
        """A forward hook of the model and of the models inside it, which is called after an error too.

        Raises:
            ValueError: the forward did not reach a layer.
        """
        forward = self._context.forward()
        if forward is None or forward.owner is not model:
            return
        forward.calls -= 1
        if forward.calls == 0:
            self.probing.end(forward, completed=output is not None)
            self._context.leave(forward)
            if torch.is_grad_enabled():
                self._past.end(tree_leaves(output), forward.worn)
            if forward.watch is not None:
                forward.watch.end(completed=output is not None)

    def _leave_ended(self, frame: FrameType) -> None:
        """Leaves forwards that `frame` is not inside of: Ctrl-C, and an error under a compiler, call no hooks."""
        forward = self._context.forward()
        while forward is not None and not forward.is_running(frame):
            self.probing.end(forward, completed=False)
            self._context.leave(forward)
            forward = self._context.forward()

    def capture(self, worn: Worn) -> Worn:
        """`worn` for a forward that a CUDA graph captures: in memory that each switch of this context writes."""
        if len(self.bank.tables) > 1:
            devices = sorted(str(table.device) for table in self.bank.tables)
            raise RuntimeError(f"the model's sites lie on several devices, {devices}, and a CUDA graph is of one")
        whole = worn.of or worn
        if worn is self._context.wearing.worn:
            written = self._context.captured(worn.rows)
            if written is not None and written is not worn.memory:
                return worn.within(written)
        memory = whole.lend()
        if memory is not None:
            self._context.capture(whole.rows, memory)
        return worn

    def _here(self) -> Worn:
        """What a forward wears that begins now in this context."""
        wearing = self._context.wearing
        if self._covering is None:
            return wearing.worn
        if wearing is not self._context.everywhere and wearing is not self._merging:
            raise RuntimeError(
                "adapters are merged into the weights, so that what this thread's route says cannot be worn: call "
                "unmerge_adapter() first"
            )
        return self._covering.worn

    def _outside(self) -> Worn:
        """What a layer wears that is called outside of any forward, or again for a gradient."""
        if not self.bank.is_settled:
            self.settle()
        again = self._past.find() if _current_task() != -1 else None
        return self._bound(self._here() if again is None else again)

    def _bound(self, worn: Worn) -> Worn:
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
        if torch.is_grad_enabled():
            worn = worn.kept(self.bank)
        self._past.begin(worn)
        return worn

    def _over_batch(
        self, model: nn.Module, worn: Worn, arguments: Mapping[str, Any], batch: Tensor | None, part: Part
    ) -> Worn:
        """`worn` over the rows, tokens and images at hand."""
        if part is Part.IMAGES:
            if worn.images is None and batch is not None and len(batch) == worn.rows:
                return worn.with_images(range(len(batch)))  # one a row, as the route does not say whose they are
            return worn
        self._check_rows(worn, batch)
        if batch is None:
            return worn
        if worn.route.by_token and part is Part.WHOLE:
            check_one_sequence(model)
            worn = self._over_tokens(model, worn, batch, arguments)
        images = images_of(model, arguments) if worn.images is None else None
        return worn if images is None else worn.with_images(images)

    def _check_rows(self, worn: Worn, batch: Tensor | None) -> None:
        index = worn.route.index
        if batch is not None and index is not None and batch.shape[0] != index.shape[0]:
            raise ValueError(
                f"the route has {index.shape[0]} rows, but the batch has {batch.shape[0]}: "
                "route() takes one mix for each row of the batch, set_adapter() one for all"
            )

    @outside_modes
    def _over_tokens(self, model: nn.Module, worn: Worn, batch: Tensor, arguments: Mapping[str, Any]) -> Worn:
        route = worn.route
        assert route.index is not None
        if route.start is not None and not is_text(batch, arguments):
            if model is not self._model():
                return worn  # the part that sees, as generate() runs it ahead: an error where a vector acts in it
            raise ValueError(
                f"the route has a start, and the batch {tuple(batch.shape)} of {batch.dtype} is no text, of which "
                "tokens can be counted: ids [rows, tokens], or vectors [rows, tokens, width]. Route rows without start"
            )
        length = batch.shape[1]
        past = self._tokens_before(arguments, length)
        if route.start is None:
            width = route.index.shape[1]
            if past == 0 and length != width and not self._context.wearing.generates:
                raise ValueError(f"the route has {width} tokens a row, but the batch has {length}")
        elif self.bank.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "the route has a start, and a captured CUDA graph does not know at which tokens it is replayed: "
                "capture it under a route without start, for tokens that come after it"
            )
        elif past + length <= int(route.start.min()):
            assert worn.before_start is not None
            return worn.before_start
        elif past >= int(route.start.max()):
            assert worn.after_start is not None
            return worn.after_start
        return worn.by_token(route.tokens(past, length).reshape(-1), length, self.bank)

    def _tokens_before(self, arguments: Mapping[str, Any], length: int) -> int:
        """How many tokens of each row came before the forward's, of which there are `length`."""
        past, wearing = cached(arguments), self._context.wearing
        if past is None and wearing.generates and arguments.get("mems") is None:
            past = wearing.seen  # XLNet alone goes over the last tokens twice
        if past is None:
            raise ValueError(
                "each token wears a mix of its own, and what the model keeps of the tokens before this forward does "
                "not say how many they were: for those that come after the start of all rows, route rows (route(…) "
                "without start or index)"
            )
        if wearing.generates:
            wearing.seen = past + length
        return past

    def _check_captured(self, route: Route) -> None:
        if route.start is not None and self._context.captured(len(route.start)) is not None:
            raise ValueError(
                f"a CUDA graph of {len(route.start)} rows was captured here, and does not know at which tokens it is "
                "replayed: enter a route without start for what it computes, and the start in another thread"
            )

    def _replace(self, wearing: Wearing, worn: Worn) -> None:
        wearing.worn = worn
        self._context.rewrite(wearing)

    def _without(self, route: Route, gone: set[Adapter]) -> Route:
        base = self.bank.resolve(BASE)
        mixes = tuple(mix if gone.isdisjoint(mix.adapters) else base for mix in route.mixes)
        return dataclasses.replace(route, mixes=mixes)

    def is_copied(self, memo: dict[int, Any]) -> bool:
        """Whether a deep copy that is being made has the whole model."""
        model = self._model()
        return model is not None and id(model) in memo

    def release(self) -> None:
        """Leaves nothing in this context."""
        self._context.wear(self._context.everywhere)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Says what pickle cannot do."""
        raise TypeError(
            "a model that ia3rt patched cannot be pickled: save_pretrained() or state_dict() its weights and "
            "save_adapter() its adapters, or unpatch() it first"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Routing:
        """One for a copied model: over a copy of the bank, worn as it is here. None of its own for a part of one."""
        if not self.is_copied(memo):
            return self
        made = memo[id(self)] = Routing.__new__(Routing)
        with self.lock:  # what is worn is of the adapters that are copied
            made.__init__(copy.deepcopy(self.bank, memo), self.backend, self.fuses_gate_up)  # type: ignore[misc]
            made.composes = self.composes
            made.guard = copy.deepcopy(self.guard, memo)
            made.settle = copy.deepcopy(self.settle, memo)
            made.trained = copy.deepcopy(self.trained, memo)
            made.wear_everywhere(copy.deepcopy(self.route, memo))
        model = self._model()
        if model is not None:
            made.attach(memo.get(id(model), model))
        return made


def _tensors(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the arguments that are tensors."""
    return tuple(name for name, x in arguments.items() if isinstance(x, Tensor))
