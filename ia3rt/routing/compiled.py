"""How a compiler or an export comes to know where a model has its rows: it cannot follow them through what it reads."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from ia3rt.routing.batch import made_up
from ia3rt.routing.probing import Probing
from ia3rt.routing.route import Route
from ia3rt.routing.traced import outside_export

_keys = itertools.count()
_compiled: weakref.WeakValueDictionary[str, Compiled] = weakref.WeakValueDictionary()


class Compiled:
    """A model that may be compiled.

    Args:
        model: the model.
        probing: what is known of it.
        route: gives what the next forward wears.
        leave_ended: leaves forwards that ended with an error: torch calls no hooks then where a compiler runs.
        compose: composes what is worn, now and from now on.
        record: lets an exported program keep what is worn.
    """

    def __init__(
        self,
        model: nn.Module,
        probing: Probing,
        route: Callable[[], Route],
        leave_ended: Callable[[], None],
        compose: Callable[[], None],
        record: Callable[[], None],
    ) -> None:
        self._model = weakref.ref(model)
        self._probing = probing
        self._route = route
        self._leave_ended = leave_ended
        self.compose_now, self.record_now = compose, record
        self._key = str(next(_keys))  # a compiler takes a string for constant, a number not always
        _compiled[self._key] = self

    def compose(self) -> None:
        """Has what is worn composed before a compiler reads it."""
        _call(self._key, "compose_now")

    def record(self) -> None:
        """Lets the program that is exported keep what is worn, before a compiler reads it."""
        _call(self._key, "record_now")

    def see(self, names: tuple[str, ...], is_of_one_row: bool) -> None:
        """Lets it be known where the model has its rows, while a compiler reads a forward with these inputs.

        Raises:
            ValueError: as `run`.
        """
        _call(self._key, "run", names, is_of_one_row)

    def run(self, names: tuple[str, ...], is_of_one_row: bool) -> None:
        """Runs a forward of inputs that are made up, once for such names, and for one row or more.

        Raises:
            ValueError: the model does not run on these, and no forward of it was looked at before.
        """
        model, index = self._model(), self._route().index
        if model is None or index is None:
            return
        if torch.compiler.is_exporting() and any(isinstance(each, FakeTensor) for each in model.parameters()):
            self._check_seen()
            return
        if not self._probing.is_new(names, is_of_one_row):
            return
        try:
            with torch.no_grad(), outside_export():
                model._call_impl(**made_up(model, names, len(index)))  # type: ignore[no-untyped-call]  # past model.compile()
        except Exception as error:
            self._leave_ended()
            if self._probing.seen:
                return  # a layer that none of those reached says so itself
            self._probing.forget()
            raise ValueError(
                "rows wear different adapters in a compiled model, and it is not known yet where it has its rows: "
                "run one such forward uncompiled first, by the model that was given to torch.compile "
                f"(a forward of inputs made up for {list(names)} failed: {error})"
            ) from error

    def _check_seen(self) -> None:
        """Raises ValueError where no forward was looked at, and none can be: the export hides the weights' numbers."""
        if not self._probing.seen:
            raise ValueError(
                "rows wear different adapters in a model that is exported, and it is not known yet where it has its "
                "rows: call the model once in this route, and export it then; or let all rows wear one mix "
                "(set_adapter)"
            )


def _call(key: str, name: str, *arguments: object) -> bool:
    """Calls a method, which is not a part of what is compiled: a compiler takes what this gives for a constant."""
    getattr(_compiled[key], name)(*arguments)
    return True


_call._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as its decorator does, which imports the compiler
