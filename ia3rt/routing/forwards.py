"""The forwards of a model, from their beginning to their end: each has what it wears bound to it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ia3rt.adapters.bank import Bank
from ia3rt.routing.batch import Arguments, main_input, named_arguments, parameter_names, with_own_rows
from ia3rt.routing.batches import Batches
from ia3rt.routing.compiled import Compiled
from ia3rt.routing.context import Context
from ia3rt.routing.ended import when_ended
from ia3rt.routing.forward import Forward, Part
from ia3rt.routing.guard import Guard
from ia3rt.routing.past import PastForwards
from ia3rt.routing.probing import Probing
from ia3rt.routing.route import Route
from ia3rt.routing.worn import Worn

_current_task = torch._C._current_graph_task_id


class Wears(Protocol):
    """What the rows of a model wear, which stands above: `Routing`."""

    bank: Bank
    guard: Guard | None
    settle: Callable[[], object]
    context: Context
    past: PastForwards
    probing: Probing
    forwards: Forwards

    @property
    def route(self) -> Route:
        """What the next forward of this context wears."""

    def here(self) -> Worn:
        """What a forward wears that begins now in this context."""

    def again(self) -> Worn | None:
        """What was worn in the forward that a backward pass computes again; None where it computes none."""

    def bound(self, worn: Worn) -> Worn:
        """`worn` as a forward that begins now may hold it."""

    def traced(self) -> Worn:
        """What is worn where a compiler reads it."""

    def compose(self) -> None:
        """Has composed what this thread wears, now and at each switch from now on."""

    def record(self) -> None:
        """Lets a program that is exported now keep what this thread wears, composed."""


class Forwards:
    """Of one model.

    Args:
        routing: what its rows wear.
    """

    def __init__(self, routing: Wears) -> None:
        self._routing = routing

    def attach(self, model: nn.Module) -> None:
        """Says which model they are of."""
        routing = self._routing
        self._names = parameter_names(model)  # a compiler does not look them up
        self._batches = Batches(model, routing.bank, routing.context)
        self._compiled = Compiled(
            model,
            routing.probing,
            lambda: routing.route,
            lambda: self.leave_ended(sys._getframe(1)),
            routing.compose,
            routing.record,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Forwards:
        """Those of the copied model."""
        copied: Wears = copy.deepcopy(self._routing, memo)
        return copied.forwards

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
        if not self._routing.bank.is_settled:
            raise RuntimeError(
                "layers were moved to other devices since the last forward: call the model once by itself, not "
                "compiled, so that their vectors follow"
            )
        if self._routing.guard is not None:
            self._routing.guard.traced(model)
        self._compiled.compose()
        self._routing.context.local.held.worn = None
        worn = self._routing.traced()
        self._routing.context.local.held.worn = worn  # to the end: other threads may switch meanwhile
        if torch.is_grad_enabled():
            worn.lent = True  # which a backward pass reads
        self._check_compiled(worn)
        if worn.by_row:
            given = named_arguments(self._names, args, kwargs)
            self._batches.check_rows(worn, main_input(given, model))
            self._compiled.see(_tensors(given), worn.is_of_one_row)

    def record(self) -> None:
        """Lets a program that is exported keep what is worn, where a compiler reads it."""
        self._compiled.record()

    def _check_compiled(self, worn: Worn) -> None:
        if worn.route.by_token:
            raise ValueError(
                "each token wears a mix of its own, which a compiled model cannot follow: call the model that was "
                "given to torch.compile (of generate(), disable_compile=True), or route rows"
            )

    def _start(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], caller: FrameType, is_compiled: bool
    ) -> Arguments | None:
        routing = self._routing
        if not routing.bank.is_settled:
            routing.settle()
        self.leave_ended(caller)
        task, outer = _current_task(), routing.context.forward()
        if outer is not None and outer.task == task:
            if outer.owner is model:
                outer.calls += 1
            return None
        if is_compiled:
            routing.compose()
        watch = None
        if routing.guard is not None:
            routing.guard.check(is_compiled)
            watch = routing.guard.watch(model, args, kwargs) if task == -1 and not is_compiled else None
        again = routing.again()
        worn = routing.here() if again is None else again
        if is_compiled:
            self._check_compiled(worn)
        is_by_row = again is None and worn.rows is not None
        if is_by_row:
            names = parameter_names(model)
            arguments = named_arguments(names, args, kwargs)
            batch, part = main_input(arguments, model), self._batches.part(model, arguments)
            worn = self._batches.over(model, worn, arguments, batch, part)
            if is_compiled:
                self._compiled.run(_tensors(arguments), worn.is_of_one_row)
        forward = Forward(routing.bound(worn), model, task, outer, caller)
        followed: Arguments | None = None
        if is_by_row and not is_compiled:
            self._lay_out(forward, part, batch)
            if routing.probing.is_first(forward, model, arguments, batch):
                followed = with_own_rows(names, args, kwargs)
                routing.probing.follow(forward, named_arguments(names, *followed))
        routing.context.enter(forward)
        forward.watch = watch
        if watch is not None:
            watch.start(self._leave_interrupted)
        elif forward.marks is not None:  # which would slow down all that this thread does
            when_ended(self._leave_interrupted)
        return followed

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
        routing = self._routing
        self.leave_ended(caller)
        worn = routing.here()
        if worn.rows is None or routing.context.forward() is not None:
            return None
        batch = main_input(arguments, model)
        over_batch = self._batches.over(model, worn, arguments, batch, Part.AHEAD)
        forward = Forward(routing.bound(over_batch), model, -1, None, caller)
        self._lay_out(forward, Part.AHEAD, batch)
        if routing.probing.is_first(forward, model, arguments, batch):
            routing.probing.follow(forward, arguments)
        routing.context.enter(forward)
        return forward

    def end_ahead(self, forward: Forward | None, completed: bool) -> None:
        """Ends what `begin_ahead` began."""
        if forward is not None:
            self._routing.probing.end(forward, completed)
            self._routing.context.leave(forward)

    def after_traced(self, model: nn.Module, args: object, output: object) -> None:
        """A forward hook, where a compiler reads it."""
        self._routing.context.local.held.worn = None

    def after_forward(self, model: nn.Module, args: object, output: object) -> None:
        """A forward hook of the model and of the models inside it, which is called after an error too.

        Raises:
            ValueError: the forward did not reach a layer.
        """
        context = self._routing.context
        forward, is_left = context.forward(), False
        if forward is None or forward.owner is not model:
            forward = next((each for each in reversed(context.suspended) if each.owner is model), None)
            if forward is None or context.forward() is not None:
                return
            is_left = context.resume(forward)  # by a `with` that was entered in it and still holds
        forward.calls -= 1
        if forward.calls == 0:
            is_completed = output is not None or sys.exc_info()[1] is forward.handled
            self._routing.probing.end(forward, completed=is_completed and not is_left)
            self._routing.context.leave(forward)
            if torch.is_grad_enabled():
                self._routing.past.end(tree_leaves(output), forward.worn)
            if forward.watch is not None:
                forward.watch.end(completed=is_completed)

    def _leave_interrupted(self) -> None:
        self.leave_ended(sys._getframe())

    def leave_ended(self, frame: FrameType) -> None:
        """Leaves forwards that `frame` is not inside of: Ctrl-C, and an error under a compiler, call no hooks."""
        forward = self._routing.context.forward()
        while forward is not None and not forward.is_running(frame):
            self._routing.probing.end(forward, completed=False)
            self._routing.context.leave(forward)
            forward = self._routing.context.forward()
        for suspended in reversed(self._routing.context.suspended):
            if not suspended.is_running(frame):
                self._routing.probing.end(suspended, completed=False)
                self._routing.context.forget(suspended)


def _tensors(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the arguments that are tensors."""
    return tuple(name for name, x in arguments.items() if isinstance(x, Tensor))
