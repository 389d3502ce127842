"""What one decoder layer does in a forward, counted: operations, module calls, Python calls and bytes allocated.

Counts do not depend on the machine's mood. A layer's are those of a model of two layers less those of one.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ia3rt.bench.adapters import names
from ia3rt.bench.contenders.registry import CONTENDERS
from ia3rt.bench.contenders.subject import Way
from ia3rt.bench.settings import Settings
from ia3rt.bench.workshop import Maker, Workshop
from ia3rt.routing import traced

_NO_KERNEL = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "lift_fresh", "detach"})
"""Operations that return new tensors and compute nothing."""
PROMPT, ROWS = 16, 16


@dataclass
class Counts:
    """What a layer does.

    Attributes:
        operations: by name, those that compute; views and empty tensors are none.
        modules: calls of nn.Module.
        calls: calls of Python functions, all told.
        bytes: allocated for results.
    """

    operations: Counter[str] = field(default_factory=Counter)
    modules: int = 0
    calls: int = 0
    bytes: int = 0

    def less(self, other: Counts) -> Counts:
        """The difference."""
        operations = self.operations - other.operations
        return Counts(operations, self.modules - other.modules, self.calls - other.calls, self.bytes - other.bytes)


@dataclass(frozen=True)
class Wearing:
    """A contender and what it wears.

    Attributes:
        contender: its name.
        mixed: how many adapters are multiplied.
        by_row: whether each of ROWS rows wears another one instead.
    """

    contender: str
    mixed: int = 1
    by_row: bool = False

    def __str__(self) -> str:
        """As tables name it."""
        if self.contender == "base":
            return f"base, {ROWS} rows" if self.by_row else "base"
        if self.by_row:
            return f"{self.contender}, {ROWS} rows, each its own"
        return f"{self.contender}, {self.mixed} adapter{'s' * (self.mixed > 1)}"


WEARINGS = (
    Wearing("base"),
    Wearing("peft", 1),
    Wearing("peft", 3),
    Wearing("ia3rt", 1),
    Wearing("ia3rt", 3),
    Wearing("ia3rt", 16),
    Wearing("base", by_row=True),
    Wearing("ia3rt", by_row=True),
)


def count_layers(
    wearings: Sequence[Wearing] = WEARINGS,
    makers: Mapping[str, Maker] = CONTENDERS,
    counting: Callable[[Way], Counts] | None = None,
) -> dict[Wearing, Counts]:
    """What a layer of SmolLM2's shape does in a decoding step in float32.

    Args:
        wearings: what is counted.
        makers: the contenders, by name.
        counting: what counts; by default `count`.
    """
    shallow, deep = (_count_models(layers, wearings, makers, counting or count) for layers in (1, 2))
    return {wearing: deep[wearing].less(shallow[wearing]) for wearing in wearings}


def _count_models(
    layers: int, wearings: Sequence[Wearing], makers: Mapping[str, Maker], counting: Callable[[Way], Counts]
) -> dict[Wearing, Counts]:
    found = {}
    with Workshop(Settings([], [], model="smollm2-135m", layers=layers), makers) as workshop:
        for wearing in wearings:
            subject = workshop.subject(wearing.contender, ROWS)
            if wearing.by_row:
                way = subject.mixed(workshop.ids(ROWS, 1), names(ROWS))
            else:
                way = subject.decode(workshop.ids(1, PROMPT), names(wearing.mixed))
            found[wearing] = counting(way)
    return found


def count(way: Way) -> Counts:
    """What a way does in one turn; the turn before, in which lazy things are made, is not counted."""
    way.run(0)
    counts = Counts()
    # What a mode sees is formed anew, as the mode may keep it: this one keeps nothing.
    with patch.object(traced, "_modes", lambda: 0), _OperationsInto(counts):
        way.run(1)
    with _calls_into(counts):
        way.run(2)
    return counts


class _OperationsInto(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in returned)
        name = func._schema.name.removeprefix("aten::")
        if not is_view and name not in _NO_KERNEL:
            self._counts.operations[name] += 1
        if not any(value.alias_info for value in returned):
            tensors = result if isinstance(result, tuple | list) else (result,)
            self._counts.bytes += sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))
        return result


@contextmanager
def _calls_into(counts: Counts) -> Iterator[None]:
    """Counts calls as the interpreter sees them: a hook on the modules would change what ia3rt does."""
    module_call = nn.Module._call_impl.__code__

    def seen(frame: Any, event: str, _: object) -> None:
        if event == "call":
            counts.calls += 1
            counts.modules += frame.f_code is module_call

    before: Callable[..., Any] | None = sys.getprofile()
    sys.setprofile(seen)
    try:
        yield
    finally:
        sys.setprofile(before)
