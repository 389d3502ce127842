"""Training, validation and test texts, chosen by what a text says: the same for all tasks, in whatever order read."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]

KEY_WORDS = 32
LEAST_WORDS = 4
_SHARES: tuple[tuple[Split, int], ...] = (("test", 30), ("validation", 15), ("train", 55))


@dataclass(frozen=True)
class LabelledText:
    """A text, which of its task's labels is right, and the hash of what it says."""

    text: str
    label: int
    key: str


@dataclass(frozen=True)
class Texts:
    """A task's texts. Those of `validation` and `test` take turns by label, so that each beginning is balanced."""

    train: tuple[LabelledText, ...]
    validation: tuple[LabelledText, ...]
    test: tuple[LabelledText, ...]


def key_of(text: str) -> str:
    """SHA-256 of what a text begins with: its first words, whatever their case, without digits and punctuation.

    Models see no more than a text's beginning, and most mass mail differs in numbers only: such texts are one. What
    differs in a word, as a reply or a mail with a random word in it, is another.
    """
    words = re.findall(r"[^\W\d_]+", text.casefold())
    return hashlib.sha256(" ".join(words[:KEY_WORDS]).encode()).hexdigest()


def split_of(key: str) -> Split:
    """Which split a text belongs to; one text to one, in all tasks."""
    place = int(key[:12], 16) % 100
    for name, share in _SHARES:
        if place < share:
            return name
        place -= share
    raise AssertionError("the shares are all of it")


def split(read: Iterable[tuple[str, int]]) -> Texts:
    """A task's distinct texts by split. One that stands there with two labels is left out, and so are the shortest."""
    found: dict[str, LabelledText] = {}
    contradicted = set()
    for text, label in read:
        line = " ".join(text.split())
        if len(re.findall(r"[^\W\d_]+", line)) < LEAST_WORDS:
            continue
        each = LabelledText(line, label, key_of(line))
        if found.setdefault(each.key, each).label != label:
            contradicted.add(each.key)
    ordered = sorted((each for key, each in found.items() if key not in contradicted), key=lambda each: each.key)
    parts = {name: [each for each in ordered if split_of(each.key) == name] for name, _ in _SHARES}
    return Texts(tuple(parts["train"]), _in_turns(parts["validation"]), _in_turns(parts["test"]))


def balanced(texts: Sequence[LabelledText], count: int, labels: int) -> list[LabelledText]:
    """The first `count` of texts that take turns by label, or fewer, so that there are as many of each label.

    Raises:
        ValueError: there are not as many.
    """
    taken = list(texts[: count - count % labels])
    if len(taken) < count - count % labels or len({each.label for each in taken}) < labels:
        raise ValueError(f"{len(texts)} texts are too few for {count} with {labels} labels: take fewer")
    return taken


def training_sample(texts: Sequence[LabelledText], count: int, labels: int, seed: int) -> list[LabelledText]:
    """Up to count / labels texts of each label, drawn by `seed`."""
    rng, drawn = random.Random(seed), []
    for label in range(labels):
        group = [each for each in texts if each.label == label]
        drawn += rng.sample(group, min(len(group), count // labels))
    return drawn


def _in_turns(texts: Sequence[LabelledText]) -> tuple[LabelledText, ...]:
    groups: dict[int, list[LabelledText]] = {}
    for each in texts:
        groups.setdefault(each.label, []).append(each)
    return tuple(each for turn in zip(*(groups[label] for label in sorted(groups)), strict=False) for each in turn)
