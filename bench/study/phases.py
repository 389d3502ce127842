"""What is asked, phase by phase. Values are chosen on validation texts; test texts are asked once with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations

from ia3rt.bench.study.asking import Asking, Question
from ia3rt.bench.study.cells import BASE, JOINT, OWN, Cell, Phase
from ia3rt.bench.study.methods import DEFAULTS, IN_A_ROW, METHODS, SUM_OF_ONES, Combining, Method, Values, weighted
from ia3rt.bench.study.sets import all_sets, cycle
from ia3rt.bench.study.settings import Scale
from ia3rt.bench.study.splits import Split

Chosen = Mapping[tuple[str, int], Values]
"""The values of a method for sets of a size."""

NEGATE = Method("negate", weighted("negate"))
JOINT_NAME, LM_NAME = "joint", "lm"


def adapter_name(task: str, seed: int) -> str:
    """What the adapter of a task is called; `joint` is one of all, `lm-movie` one that learned to write such texts."""
    return f"{task}-{seed}"


def _analogy(given: Combining, name: str, values: Values) -> None:
    weight = values["weight"]
    given.rt.add_weighted_adapter(given.names, [weight, weight, 1.0], name, "analogy")


ANALOGY = Method("analogy", _analogy, ({"weight": 0.5}, {"weight": 1.0}))


def grid_of(method: Method, scale: Scale) -> Sequence[Values]:
    """The values that are tried."""
    grid: Sequence[Values] = method.grid[:: scale.grid]
    return grid


def alone(asking: Asking, scale: Scale) -> Iterator[Cell]:
    """Each adapter on its own task, no adapter, and the one that was trained on all."""
    for seed in scale.seeds:
        for task in (*scale.main, *scale.domain):
            own, joint = adapter_name(task, seed), adapter_name(JOINT_NAME, seed)
            yield asking.cell(Question("alone", (task,), OWN, {}, seed, own, own, task, "test", scale.test))
            yield asking.cell(Question("alone", (), BASE, {}, seed, None, own, task, "test", scale.test))
            if task in scale.main:
                yield asking.cell(
                    Question("alone", scale.main, JOINT, {}, seed, joint, joint, task, "test", scale.test)
                )


def tuning(asking: Asking, scale: Scale) -> Iterator[Cell]:
    """Each method with each of its values, or with none, on validation texts, with the adapters of one seed."""
    seed = scale.seeds[0]
    for size in sizes(scale):
        count = scale.validation if size == 2 else scale.validation_of_triples
        for method in METHODS:
            if not method.takes(size):
                continue
            for values in grid_of(method, scale):
                for tasks in cycle(scale.main, size):
                    yield from _asked(asking, "tuning", method, values, seed, tasks, tasks, "validation", count)


def choose(cells: Sequence[Cell], scale: Scale) -> dict[tuple[str, int], Values]:
    """The values with the highest mean accuracy, for each method and size; of equals the first."""
    found: dict[tuple[str, int], Values] = {}
    for size in sizes(scale):
        for method in METHODS:
            tried = [each for each in cells if each.method == method.name and len(each.adapters) == size]

            def mean(values: Values, tried: Sequence[Cell] = tried) -> Fraction:  # exact, so that equals are equal
                scores = [Fraction(c.right.count("1"), len(c.right)) for c in tried if c.values == values]
                return sum(scores, Fraction()) / len(scores)

            found[method.name, size] = max(grid_of(method, scale), key=mean) if tried else method.grid[0]
    return found


def test(asking: Asking, scale: Scale, chosen: Chosen) -> Iterator[Cell]:
    """Each method on all sets, and what goes wrong on one of them."""
    for seed in scale.seeds:
        for tasks in all_sets(scale.main):
            count = _texts_of(tasks, scale)
            for method in METHODS:
                if method.takes(len(tasks)):
                    values = chosen[method.name, len(tasks)]
                    yield from _asked(asking, "test", method, values, seed, tasks, tasks, "test", count)
    first = scale.main[:2]
    yield from _asked(asking, "warning", SUM_OF_ONES, {}, scale.seeds[0], first, first, "test", scale.test)


def defaults(asking: Asking, scale: Scale) -> Iterator[Cell]:
    """Two values each of some methods, on pairs and on all at once: which a user should get who gives none."""
    methods = {each.name: each for each in METHODS}
    chosen = [tasks for tasks in all_sets(scale.main) if len(tasks) in (2, len(scale.main))]
    for seed in scale.seeds:
        for tasks in chosen:
            for name, compared in DEFAULTS.items():
                for values in compared:
                    asked = (asking, "defaults", methods[name], values, seed, tasks, tasks, "test")
                    yield from _asked(*asked, _texts_of(tasks, scale))


def domain(asking: Asking, scale: Scale, chosen: Chosen) -> Iterator[Cell]:
    """The same task in several domains: each adapter and each pair of them, in all the domains."""
    methods = [each for each in METHODS if each.name in IN_A_ROW]
    tasks = ("movie", *scale.domain)
    for seed in scale.seeds:
        for one in tasks:
            for task in tasks:
                vectors, owner = adapter_name(one, seed), adapter_name(task, seed)
                yield asking.cell(Question("domain", (one,), OWN, {}, seed, vectors, owner, task, "test", scale.test))
        for pair in combinations(tasks, 2):
            for method in methods:
                values = chosen[method.name, 2]
                yield from _asked(asking, "domain", method, values, seed, pair, tasks, "test", scale.test)


def forgetting(asking: Asking, scale: Scale) -> Iterator[Cell]:
    """Each adapter negated, on its own task and on the others."""
    for seed in scale.seeds:
        for target in scale.main:
            values, count = {"weight": 1.0}, scale.test_of_triples
            yield from _asked(asking, "negate", NEGATE, values, seed, (target,), scale.main, "test", count)


def analogy(asking: Asking, scale: Scale) -> Iterator[Cell]:
    """Movie texts are to Amazon texts as movie sentiment is to Amazon sentiment.

    No label of an Amazon text is seen, but for those by which one of two weights is chosen.
    """

    def asked(values: Values, seed: int, split: Split, count: int) -> Iterator[Cell]:
        known = (f"{LM_NAME}-movie", f"{LM_NAME}-amazon", "movie")
        yield from _asked(asking, "analogy", ANALOGY, values, seed, known, ("amazon",), split, count)

    tried = [each for values in ANALOGY.grid for each in asked(values, scale.seeds[0], "validation", scale.validation)]
    yield from tried
    best = max(tried, key=lambda each: each.accuracy).values
    for seed in scale.seeds:
        yield from asked(best, seed, "test", scale.test)


def sizes(scale: Scale) -> list[int]:
    """How many adapters are combined: two, three, and all."""
    return sorted({len(tasks) for tasks in all_sets(scale.main)})


def _texts_of(tasks: Sequence[str], scale: Scale) -> int:
    """Test texts a task of a set."""
    count: int = scale.test_of_triples if len(tasks) == 3 else scale.test
    return count


def _asked(
    asking: Asking,
    phase: Phase,
    method: Method,
    values: Values,
    seed: int,
    adapters: tuple[str, ...],
    tasks: tuple[str, ...],
    split: Split,
    count: int,
) -> Iterator[Cell]:
    names = [adapter_name(each, seed) for each in adapters]
    with asking.combined(method, names, values) as merged:
        for task in tasks:
            own = adapter_name(task, seed)
            yield asking.cell(Question(phase, adapters, method.name, values, seed, merged, own, task, split, count))
