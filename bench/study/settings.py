"""How much of the study is run: in full, or quickly to see that it runs."""

from __future__ import annotations

from dataclasses import dataclass

from ia3rt.bench.study.tasks import DOMAIN, MAIN


@dataclass(frozen=True)
class Budget:
    """How an adapter is trained: AdamW, a warm-up of a tenth of the steps, then linear decay to 0.

    Attributes:
        steps: of each adapter.
        rows: texts a step of an adapter of one task.
        rows_of_joint: texts a step and task of the adapter that is trained on all.
        texts: how many different texts an adapter is trained on, at most.
        check_every: steps between looks at the validation texts; what was best there is kept.
    """

    steps: int
    rows: int
    rows_of_joint: int
    texts: int
    check_every: int


@dataclass(frozen=True)
class Scale:
    """The sizes of a run.

    Attributes:
        name: the folder of its results.
        main: tasks that are combined in all pairs, all triples and all at once.
        domain: the same task as `movie` in other domains.
        seeds: of the adapters.
        budget: of training.
        length: tokens of a text that a model sees, at most.
        validation: texts a task, for choosing the best step and for tuning sets of two.
        validation_of_triples: texts a task, for tuning larger sets.
        test: texts a task.
        test_of_triples: texts a task for sets of three, of which there are most.
        seen: training texts a task that the importances of `fisher` and the activations are means over.
        curve_steps: steps that are trained with PEFT as well, in float32.
        grid: every how many-th of the values that a method could have is tried.
    """

    name: str
    main: tuple[str, ...]
    domain: tuple[str, ...]
    seeds: tuple[int, ...]
    budget: Budget
    length: int
    validation: int
    validation_of_triples: int
    test: int
    test_of_triples: int
    seen: int
    curve_steps: int
    grid: int


FULL = Scale(
    name="study",
    main=tuple(MAIN),
    domain=tuple(DOMAIN),
    seeds=(0, 1, 2),
    budget=Budget(steps=120, rows=16, rows_of_joint=6, texts=2000, check_every=20),
    length=40,
    validation=40,
    validation_of_triples=24,
    test=96,
    test_of_triples=40,
    seen=48,
    curve_steps=40,
    grid=1,
)
QUICK = Scale(
    name="study-quick",
    main=("movie", "author", "news"),
    domain=("amazon",),
    seeds=(0,),
    budget=Budget(steps=16, rows=8, rows_of_joint=4, texts=400, check_every=8),
    length=32,
    validation=24,
    validation_of_triples=12,
    test=24,
    test_of_triples=24,
    seen=8,
    curve_steps=3,
    grid=4,
)
