"""All that the study does with one model: training, importances, and asking."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ia3rt.adapters.site import SiteKey
from ia3rt.bench.study import phases, precision
from ia3rt.bench.study.adapters import PUBLISHED, TrainedAdapters
from ia3rt.bench.study.asking import Asking, Counting, ModelAsking, Prompts
from ia3rt.bench.study.cells import BASE, OWN, Cell
from ia3rt.bench.study.curve import curves
from ia3rt.bench.study.importance import fisher_information, mean_squares
from ia3rt.bench.study.methods import BySite
from ia3rt.bench.study.models import Decoder, Prompt, StudyModel
from ia3rt.bench.study.phases import JOINT_NAME, LM_NAME, adapter_name
from ia3rt.bench.study.plan import ANSWERS, FLOAT32_COST, ONE_BY_ONE, Part, part_of, tokens_a_second
from ia3rt.bench.study.precision import Precision
from ia3rt.bench.study.publishing import card_of, publish
from ia3rt.bench.study.settings import Budget, Scale
from ia3rt.bench.study.splits import LabelledText, Split, Texts, balanced, training_sample
from ia3rt.bench.study.store import Store, key_of
from ia3rt.bench.study.tasks import TASKS
from ia3rt.bench.study.training import TRAINING_COST, Learner, Point

Begin = Callable[[Part], AbstractContextManager[Callable[[int], None]]]
"""Begins a part of the run; what its context gives is told the tokens that were read."""

SPLITS: tuple[Split, ...] = ("validation", "test")
_LM_TASKS = ("movie", "amazon")


class OneModel:
    """A model and what the study has of it.

    Args:
        kind: which model.
        texts: by task.
        scale: how much is done.
        store: what is known.
        cache: where trained adapters are kept.
    """

    def __init__(
        self, kind: type[StudyModel], texts: Mapping[str, Texts], scale: Scale, store: Store, cache: Path
    ) -> None:
        self._kind, self._texts, self._scale, self._store = kind, texts, scale, store
        self._tasks = (*scale.main, *scale.domain)
        self.model = kind.load(kind.training_dtype)
        self._adapters = TrainedAdapters(cache / self.model.name)
        counts = {"validation": scale.validation, "test": scale.test}
        self._prompts: Prompts = {
            (task, split): self.model.prompts(task, self._chosen(task, split, counts[split]), scale.length)
            for task in self._tasks
            for split in SPLITS
        }
        asked = self._prompts[scale.main[0], "test"]
        self.speeds = {
            dtype: tokens_a_second(self.model if dtype == self._kind.training_dtype else kind.load(dtype), asked)
            for dtype in {self._kind.training_dtype, ANSWERS}
        }

    @property
    def is_decoder(self) -> bool:
        """Whether it writes text, so that an adapter can learn to write like a domain."""
        return isinstance(self.model, Decoder)

    def seconds(self, part: Part, tokens: int) -> float:
        """How long it takes to read tokens in a part of the run, as estimated."""
        seconds: float = tokens * part.cost / self.speeds[part.dtype or ANSWERS]
        return seconds

    def parts(self) -> dict[str, Part]:
        """What is done, by name, in its order."""
        scale, budget = self._scale, self._scale.budget
        found = [self._training_part(learners) for learners in self._learners()]
        if self.is_decoder:
            rows = 2 * scale.curve_steps * budget.rows
            like = self._prompts[scale.main[0], "test"]
            found.append(part_of("curve beside PEFT", rows, like, TRAINING_COST * FLOAT32_COST))
        like = [each for task in self._tasks for each in self._prompts[task, "validation"]]
        rows = len(scale.main) * scale.validation
        found.append(part_of("precision", 8 * rows, like, 2))
        rows = len(self._tasks) * scale.seen * len(scale.seeds)
        found.append(part_of("importances", rows, like, ONE_BY_ONE * TRAINING_COST))
        for name, ask in self._questions().items():
            counting = Counting(self._prompts)
            list(ask(counting))
            found.append(Part(name, counting.rows, counting.tokens))
        return {part.name: part for part in found}

    def train(self, begin: Begin) -> list[Point]:
        """Trains what is not trained yet; returns the course of all."""
        points = []
        for learners in self._learners():
            with begin(self._training_part(learners)) as done:
                points += self._train(learners, done)
        return points

    def curve(self, begin: Begin) -> Mapping[str, Tensor]:
        """The loss through ia3rt and through PEFT; nothing of a model that is no decoder."""
        if not self.is_decoder:
            return {}
        task, scale = self._scale.main[0], self._scale
        prompts = self._training_prompts(Learner("", (task,), 0), task, is_lm=False)

        def compute() -> Mapping[str, Tensor]:
            model = self._kind.load(torch.float32)
            assert isinstance(model, Decoder)
            losses: Mapping[str, Tensor] = curves(model, task, 0, prompts, scale.budget, scale.curve_steps, done)
            return losses

        with begin(self.parts()["curve beside PEFT"]) as done:
            key = key_of("curve", self.model.name, self._kind.lr, scale.budget, scale.curve_steps, prompts)
            known: Mapping[str, Tensor] = self._store.once(key, compute)
        return known

    def settle(self, begin: Begin) -> dict[str, Any]:
        """Compares precisions, and takes from then on the dtype to answer in; returns what was seen.

        Trained adapters are brought into the model that answers.
        """
        with begin(self.parts()["precision"]):
            numbers = [self._adapters.numbers(adapter_name(task, self._scale.seeds[0])) for task in self._scale.main]
            flat = [x for vectors in numbers for x in vectors.values()]
            key = key_of("precision", self.model.name, dict(enumerate(flat)), list(self._prompts.items()))
            seen: dict[str, Any] = self._store.once_data(key, self._compare_dtypes)
            if seen["answers in"] != str(self.model.dtype):
                self.model = self._kind.load(getattr(torch, seen["answers in"].removeprefix("torch.")))
            for learner in self._all_learners():
                self._adapters.bring(self.model, learner.name, learner.tasks)
            seen |= self._store.once_data(f"rounding {key}", self._compare_rounding)
        return seen

    def answer(self, begin: Begin) -> list[Cell]:
        """Asks all that the study asks; what was asked before is known."""
        with begin(self.parts()["importances"]) as done:
            fisher, squares = self._importances(done)
        cells: list[Cell] = []
        for name, ask in self._questions(cells).items():
            with begin(self.parts()[name]) as done:
                cells += ask(ModelAsking(self.model, self._prompts, self._store, fisher, squares, done))
        return cells

    def publish(self, cells: Sequence[Cell], folder: Path) -> None:
        """Writes all trained adapters as others load them."""
        for learner in self._all_learners():
            accuracies = {}
            for task in learner.tasks if not learner.name.startswith(LM_NAME) else ():
                alone = [c for c in cells if c.phase == "alone" and c.seed == learner.seed and c.task == task]
                own = next(c for c in alone if (c.method == OWN) == (len(learner.tasks) == 1) and c.method != BASE)
                base = next(c for c in alone if c.method == BASE)
                accuracies[task] = base.accuracy, own.accuracy, len(own.right)
            is_lm = learner.name.startswith(LM_NAME)
            budget = self._budget(is_lm)
            card = card_of(
                self.model, learner.name, learner.tasks, accuracies, learner.seed, budget, self._scale.length, is_lm
            )
            publish(self.model, learner.name, learner.tasks, folder / learner.name, card)

    def _chosen(self, task: str, split: Split, count: int) -> Sequence[LabelledText]:
        try:
            chosen: Sequence[LabelledText] = balanced(getattr(self._texts[task], split), count, len(TASKS[task].labels))
        except ValueError as error:
            raise ValueError(f"task {task!r}, {split}: {error}") from None
        return chosen

    def _learners(self) -> Iterator[list[Learner]]:
        """Who is trained in one mixed batch: the seeds of a task."""
        seeds = self._scale.seeds
        for task in self._tasks:
            yield [Learner(adapter_name(task, seed), (task,), seed) for seed in seeds]
        yield [Learner(adapter_name(JOINT_NAME, seed), self._scale.main, seed) for seed in seeds]
        if self._has_analogy:
            for task in _LM_TASKS:
                yield [Learner(adapter_name(f"{LM_NAME}-{task}", seed), (task,), seed) for seed in seeds]

    def _all_learners(self) -> list[Learner]:
        return [each for group in self._learners() for each in group]

    @property
    def _has_analogy(self) -> bool:
        return self.is_decoder and set(_LM_TASKS) <= set(self._tasks)

    def _budget(self, is_lm: bool) -> Budget:
        budget = self._scale.budget
        return replace(budget, steps=max(2, budget.steps // 2), rows=budget.rows // 2) if is_lm else budget

    def _training_part(self, learners: Sequence[Learner]) -> Part:
        name, tasks = learners[0].name.rpartition("-")[0], learners[0].tasks
        budget = self._budget(name.startswith(LM_NAME))
        rows_a_task = budget.rows if len(tasks) == 1 else budget.rows_of_joint
        like = [each for task in tasks for each in self._prompts[task, "validation"]]
        rows = budget.steps * rows_a_task * len(tasks) * len(learners)
        checks = -(-budget.steps // budget.check_every) * self._scale.validation * len(tasks) * len(learners)
        dtype = self._kind.training_dtype
        return part_of(f"train {name}", rows + checks // TRAINING_COST, like, TRAINING_COST, dtype)

    def _training_prompts(self, learner: Learner, task: str, is_lm: bool) -> list[Prompt]:
        scale, labels = self._scale, len(TASKS[task].labels)
        drawn = training_sample(self._texts[task].train, scale.budget.texts, labels, learner.seed)
        return self._as_prompts(task, drawn, is_lm)

    def _as_prompts(self, task: str, texts: Sequence[LabelledText], is_lm: bool) -> list[Prompt]:
        prompts: list[Prompt]
        if is_lm:
            assert isinstance(self.model, Decoder)
            prompts = self.model.plain(texts, self._scale.length)
        else:
            prompts = self.model.prompts(task, texts, self._scale.length)
        return prompts

    def _train(self, learners: Sequence[Learner], done: Callable[[int], None]) -> list[Point]:
        is_lm = learners[0].name.startswith(LM_NAME)
        prompts = {(who.name, task): self._training_prompts(who, task, is_lm) for who in learners for task in who.tasks}
        count = self._scale.validation
        checked = {task: self._chosen(task, "validation", count) for task in learners[0].tasks}
        points: list[Point] = self._adapters.train(
            lambda: self.model,
            (self.model.name, self._kind.training_dtype, self._kind.lr),
            learners,
            prompts,
            {task: self._as_prompts(task, texts, is_lm) for task, texts in checked.items()},
            self._budget(is_lm),
            lambda model: model.text_losses if is_lm and isinstance(model, Decoder) else model.losses,
            done,
        )
        return points

    def _compare_dtypes(self) -> dict[str, Any]:
        """The shorter dtype answers where it is faster, and answers the same but for noise."""
        scale, seed, other = self._scale, self._scale.seeds[0], {torch.float32: torch.bfloat16}
        models = {self._kind.training_dtype: self.model}
        missing = other.get(self._kind.training_dtype, torch.float32)
        models[missing] = self._kind.load(missing)
        names = [(adapter_name(task, seed), (task,)) for task in scale.main]
        for model in models.values():
            for name, tasks in names:
                self._adapters.bring(model, name, tasks)
        exact, short = models[torch.float32], models[torch.bfloat16]
        seen = precision.compare_dtypes(exact, short, scale.main, seed, self._prompts)
        for name, tasks in names:
            for part in self.model.parts(name, tasks):
                self.model.rt.delete_adapter(part)
        is_taken = seen.is_equal_but_for_noise and seen.speed[1] > seen.speed[0]
        return {"model": asdict(seen), "answers in": str(torch.bfloat16 if is_taken else torch.float32)}

    def _compare_rounding(self) -> dict[str, Any]:
        """How much it costs to publish shorter numbers, and whether a mixed batch answers as its adapters alone."""
        tasks, seed = self._scale.main, self._scale.seeds[0]
        rounded: list[Precision] = [
            precision.compare_rounding(self.model, self._adapters.numbers, dtype, tasks, seed, self._prompts)
            for dtype in (PUBLISHED, torch.bfloat16)
        ]
        mixed = precision.compare_mixed(self.model, tasks, seed, self._prompts)
        return {"vectors": [asdict(each) for each in rounded], "mixed": asdict(mixed)}

    def _importances(self, done: Callable[[int], None]) -> tuple[dict[str, BySite], dict[str, BySite]]:
        fisher: dict[str, BySite] = {}
        squares: dict[str, BySite] = {}
        for task in self._tasks:
            texts = training_sample(self._texts[task].train, self._scale.seen, len(TASKS[task].labels), 0)
            prompts = self.model.prompts(task, texts, self._scale.length)
            of_task = self._by_site(("squares", task, prompts), lambda p=prompts: mean_squares(self.model, p, done))  # type: ignore[misc]
            for seed in self._scale.seeds:
                name = adapter_name(task, seed)
                numbers = dict(self.model.rt.get_adapter(name).vectors)
                fisher[name] = self._by_site(
                    ("fisher", task, prompts, numbers),
                    lambda n=name, t=task, p=prompts: fisher_information(self.model, n, n, t, p, done),  # type: ignore[misc]
                )
                squares[name] = of_task
        return fisher, squares

    def _by_site(self, key: tuple[object, ...], compute: Callable[[], Mapping[SiteKey, Tensor]]) -> BySite:
        known = key_of(self.model.name, str(self.model.dtype), *key)
        stored = self._store.once(known, lambda: {"|".join(site): x for site, x in compute().items()})
        return {(path, side): x for name, x in stored.items() for path, _, side in (name.rpartition("|"),)}

    def _questions(self, answered: Sequence[Cell] = ()) -> dict[str, Callable[[Asking], Iterator[Cell]]]:
        """What is asked, by name. What is asked on test texts depends on what was answered to validation texts."""
        scale = self._scale

        def chosen() -> phases.Chosen:
            return phases.choose([each for each in answered if each.phase == "tuning"], scale)

        asked: dict[str, Callable[[Asking], Iterator[Cell]]] = {
            "alone": lambda asking: phases.alone(asking, scale),
            "values": lambda asking: phases.tuning(asking, scale),
            "sets": lambda asking: phases.test(asking, scale, chosen()),
            "defaults": lambda asking: phases.defaults(asking, scale),
            "domains": lambda asking: phases.domain(asking, scale, chosen()),
            "forgetting": lambda asking: phases.forgetting(asking, scale),
        }
        if self._has_analogy:
            asked["analogy"] = lambda asking: phases.analogy(asking, scale)
        return asked
