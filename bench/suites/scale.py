"""How the number of adapters that are known, but not worn, shows."""

from __future__ import annotations

from collections.abc import Iterator

from ia3rt.bench.contenders import registered
from ia3rt.bench.suites.case import PEFT_FIRST, Case, Suite, Value, by_subject
from ia3rt.bench.workshop import Maker

ROWS, LENGTH, PROMPT = 2, 4, 128
MAKERS: dict[str, Maker] = {"ia3rt": registered.subject}
WITHOUT = {
    "merged": "how many other adapters there are is nothing to merged weights",
    **dict.fromkeys(("base-compiled", "peft-compiled", "ia3rt-compiled"), "it would say the same of other forwards"),
}


def _cases(quick: bool) -> Iterator[Case]:
    for count in (64, 1000) if quick else (1, 64, 1000, 10_000):
        if not quick:
            yield _step(count)
        yield from (_mixed(count), _switch(count), _from_host(count), _from_disk(count), _resident(count))


def _step(count: int) -> Case:
    way = lambda workshop, subject: subject.decode(workshop.ids(1, PROMPT), [_last(count)])  # noqa: E731
    ways = by_subject(way, count, "scale", WITHOUT, MAKERS)
    return Case("step", {"adapters": count}, ways, work=1, unit="tokens")


def _mixed(count: int) -> Case:
    worn = ["task0", _last(count)]
    way = lambda workshop, subject: subject.mixed(workshop.ids(ROWS, LENGTH), worn)  # noqa: E731
    ways = by_subject(way, count, "scale", WITHOUT, MAKERS)
    return Case("mixed forward", {"adapters": count, "rows": ROWS}, ways, work=ROWS * LENGTH, unit="tokens")


def _switch(count: int) -> Case:
    mixes = [(_last(count),), ("task0",)]
    ways = by_subject(lambda _, subject: subject.switch(mixes), count, "scale", WITHOUT, MAKERS)
    return Case("set", {"adapters": count}, ways, references=PEFT_FIRST)


def _from_host(count: int) -> Case:
    ways = by_subject(lambda _, subject: subject.from_host(), count, "scale", WITHOUT, MAKERS)
    return Case("set, from the host's memory", {"adapters": count}, ways, references=PEFT_FIRST)


def _from_disk(count: int) -> Case:
    way = lambda workshop, subject: subject.from_disk(workshop.adapters.folder("task0"))  # noqa: E731
    ways = by_subject(way, count, "scale", WITHOUT, MAKERS)
    return Case("set, from the disk", {"adapters": count}, ways, references=PEFT_FIRST)


def _resident(count: int) -> Case:
    ways = by_subject(lambda _, subject: Value(subject.resident_bytes()), count, "scale", WITHOUT, MAKERS)
    return Case("resident", {"adapters": count}, ways, references=PEFT_FIRST, unit="bytes")


def _last(count: int) -> str:
    return f"task{count - 1}"


SUITE = Suite(
    "scale",
    "A decoding step, a mixed forward, switching, and bringing an adapter in, beside many that are known: ia3rt's are "
    f"registered, and its bank takes {registered.BANK / 1e6:.0f} MB; PEFT's are loaded, and from the disk one more is.",
    _cases,
    x="adapters",
)
