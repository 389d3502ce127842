"""A case: one thing that all contenders do, and are compared in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from ia3rt.bench.contenders.subject import LeftOut, Subject, Way
from ia3rt.bench.workshop import Maker, Workshop
from ia3rt.cli.errors import first_line

UNADAPTED_FIRST = ("base", "base-compiled", "merged", "peft", "adapterhub", "ia3rt", "peft-compiled", "ia3rt-compiled")
"""Ratios of a forward are to the model without adapters."""
PEFT_FIRST = ("peft", "merged", "adapterhub", "ia3rt", "peft-compiled", "ia3rt-compiled")
"""Those of what only adapters have are to PEFT."""


@dataclass(frozen=True)
class Value:
    """A number that is read rather than timed."""

    number: float


@dataclass
class Ways:
    """How each contender does a case, by name; why the others do not; and what makes a contender's second way.

    The second way is that of another model made alike; None where contenders have no models.
    """

    ways: dict[str, Way | Value] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    again: Callable[[str], Way | Value] | None = None


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        what: what is done, in a word or two; cases that differ in numbers only share it.
        parameters: the numbers, by name.
        ways: makes the contenders' ways.
        references: which contender ratios are to: the first of these that is there; none without any.
        work: how many of `unit` one run does; None where a rate says nothing.
        unit: what they are; "bytes" where the ways are values.
        beside: the context in which the ways are timed, with what else the machine does meanwhile.
        rounds: how often at most it is timed, where a round takes minutes; None as often as the settings say.
    """

    what: str
    parameters: Mapping[str, int | str]
    ways: Callable[[Workshop, Sequence[str]], Ways]
    references: Sequence[str] = UNADAPTED_FIRST
    work: int | None = None
    unit: str = "s"
    beside: Callable[[], AbstractContextManager[object]] = nullcontext
    rounds: int | None = None

    @property
    def name(self) -> str:
        """The case in a line, such as `decode rows=8 length=32`."""
        return " ".join([self.what, *(f"{name}={value}" for name, value in self.parameters.items())])


@dataclass(frozen=True)
class Suite:
    """Cases about one question.

    Attributes:
        name: as the command line has it.
        about: what is measured, in a sentence.
        cases: makes the cases; is told whether only the quick ones are wanted.
        x: the parameter along the axis of its plots.
        wants: says why a device is of no use for it; None where it is.
        in_graph: makes of a case the one that `--graph` adds after it; None where it adds none.
    """

    name: str
    about: str
    cases: Callable[[bool], Iterator[Case]]
    x: str
    wants: Callable[[torch.device], str | None] = lambda _: None
    in_graph: Callable[[Case], Case] | None = None


def by_subject(
    way: Callable[[Workshop, Subject], Way | Value],
    adapters: int = 4,
    purpose: str = "",
    without: Mapping[str, str] | None = None,
    makers: Mapping[str, Maker] | None = None,
) -> Callable[[Workshop, Sequence[str]], Ways]:
    """The ways of contenders that all do it on a subject with so many adapters.

    Args:
        way: makes one of them.
        adapters: how many the subject holds.
        purpose: see `Workshop.subject`.
        without: contenders that are left out, and why.
        makers: of contenders whose model is made in another way than elsewhere.
    """
    reasons, others = without or {}, makers or {}

    def made_for(workshop: Workshop, name: str, again: bool = False) -> Subject:
        return workshop.subject(name, adapters, purpose, again, others.get(name))

    def ways(workshop: Workshop, contenders: Sequence[str]) -> Ways:
        def again(name: str) -> Way | Value:
            return way(workshop, made_for(workshop, name, again=True))

        made = Ways(again=again)
        for name in contenders:
            if name in reasons:
                made.left_out[name] = reasons[name]
                continue
            try:
                made.ways[name] = way(workshop, made_for(workshop, name))
            except LeftOut as reason:
                made.left_out[name] = str(reason)
            except Exception as error:  # one contender's error must not end the others' run; it is named
                made.failed[name] = described(error)
        return made

    return ways


def described(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {first_line(error)}"
