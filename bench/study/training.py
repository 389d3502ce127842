"""Trains several adapters of one model at once, each on its rows of one mixed batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ia3rt.bench.study.models import BATCH, Prompt, StudyModel
from ia3rt.bench.study.settings import Budget
from ia3rt.examples.tasks import length_pools

TRAINING_COST = 3
"""What a token costs in training, forward and backward, in tokens of a forward: about."""

Losses = Callable[[Sequence[Prompt], str], Tensor]
"""The loss of each prompt of a task, float32 [rows], with what is worn now."""


@dataclass(frozen=True)
class Learner:
    """An adapter to train.

    Attributes:
        name: the adapter's.
        tasks: which it learns, each with as many texts a step.
        seed: of the texts that it sees, and of their order. Nothing else is random: IA³ begins at ones.
    """

    name: str
    tasks: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Point:
    """Where an adapter's training was after a step: mean losses, in nats."""

    adapter: str
    step: int
    train_loss: float
    validation_loss: float
    is_best: bool


class Descent:
    """AdamW with a warm-up of a tenth of the steps and linear decay to 0: one for who trains through ia3rt or PEFT."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, budget: Budget) -> None:
        self._optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
        steps, warm = budget.steps, max(1, budget.steps // 10)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: min(1.0, (step + 1) / warm) * (1 - step / steps)
        )

    def step(self) -> None:
        """Goes a step along the gradients, and forgets them."""
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()


def batches(prompts: Sequence[Prompt], size: int, seed: int) -> Iterator[list[Prompt]]:
    """Random batches without end, each of prompts of about one length.

    Which prompts depends on `seed`; whether short or long ones does not, so that what several adapters see in one step
    is of one length.
    """
    order = random.Random(0)
    for pool in length_pools(list(prompts), size, random.Random(seed), lambda each: len(each.ids)):
        order.shuffle(pool)
        yield from pool


def train(
    model: StudyModel,
    learners: Sequence[Learner],
    train_prompts: Mapping[tuple[str, str], Sequence[Prompt]],
    validation: Mapping[str, Sequence[Prompt]],
    budget: Budget,
    losses: Losses,
    done: Callable[[int], None],
    stop_after: int | None = None,
) -> list[Point]:
    """Trains adapters that the model has, and leaves each as it was when its validation loss was lowest.

    Args:
        model: its learners' adapters were added by `StudyModel.add`.
        learners: with one seed or several, of the same tasks or of others.
        train_prompts: by a learner's name and a task.
        validation: by task.
        budget: of each learner.
        losses: what is made small.
        done: is told the tokens of each batch.
        stop_after: steps, where fewer than the budget's are run, on its schedule; what is reached then is kept.

    Returns:
        The course of each learner, by step.
    """
    parts = {each.name: model.parts(each.name, each.tasks) for each in learners}
    first = learners[0]
    model.rt.set_adapter(model.worn(first.name, first.name, first.tasks[0]))  # else it would be the product of all
    model.rt.train_adapter([name for names in parts.values() for name in names])
    try:
        return _descend(model, learners, train_prompts, validation, budget, losses, done, stop_after)
    finally:
        model.rt.end_training()
        model.rt.set_adapter(None)


def _descend(
    model: StudyModel,
    learners: Sequence[Learner],
    train_prompts: Mapping[tuple[str, str], Sequence[Prompt]],
    validation: Mapping[str, Sequence[Prompt]],
    budget: Budget,
    losses: Losses,
    done: Callable[[int], None],
    stop_after: int | None,
) -> list[Point]:
    own = {each.name: parameters_of(model, each) for each in learners}
    descent = Descent([p for group in own.values() for p in group], model.lr, budget)
    streams = {
        (each.name, task): batches(train_prompts[each.name, task], _rows(each, budget), each.seed)
        for each in learners
        for task in each.tasks
    }
    best = {each.name: (float("inf"), [p.detach().clone() for p in own[each.name]]) for each in learners}
    points = []
    for step in range(1, (stop_after or budget.steps) + 1):
        lost = dict.fromkeys(own, 0.0)
        for task in dict.fromkeys(task for each in learners for task in each.tasks):
            asked = [each for each in learners if task in each.tasks]
            rows = {each.name: next(streams[each.name, task]) for each in asked}
            prompts = [prompt for each in rows.values() for prompt in each]
            mixes = [model.worn(each.name, each.name, task) for each in asked for _ in rows[each.name]]
            with model.rt.route(mixes):
                by_row = torch.split(losses(prompts, task), [len(each) for each in rows.values()])
                parted = [each.mean() / len(who.tasks) for each, who in zip(by_row, asked, strict=True)]
                sum(parted, torch.zeros(())).backward()  # type: ignore[no-untyped-call]
            for who, loss in zip(asked, parted, strict=True):
                lost[who.name] += float(loss.detach())
            done(sum(len(each.ids) for each in prompts))
        descent.step()
        if step % budget.check_every and step != budget.steps:
            points += [Point(name, step, loss, float("nan"), False) for name, loss in lost.items()]
            continue
        for each in learners:
            checked = _validation_loss(model, each, validation, losses, done)
            is_best = checked < best[each.name][0]
            if is_best:
                best[each.name] = checked, [p.detach().clone() for p in own[each.name]]
            points.append(Point(each.name, step, lost[each.name], checked, is_best))
    if stop_after is None:
        with torch.no_grad():
            for each in learners:
                for parameter, kept in zip(own[each.name], best[each.name][1], strict=True):
                    parameter.copy_(kept)
    return points


def parameters_of(model: StudyModel, learner: Learner) -> list[nn.Parameter]:
    """A learner's own parameters while it is trained: its vectors and its heads, but no vector that carries a head."""
    ends = [f".ia3_{side}_{learner.name}" for side in ("in", "out")]
    heads = [f"ia3_own_{part}_" for part in model.parts(learner.name, learner.tasks)[1:]]
    return [
        parameter
        for name, parameter in model.model.named_parameters()
        if any(name.endswith(end) for end in ends) or any(head in name for head in heads)
    ]


def _rows(learner: Learner, budget: Budget) -> int:
    rows: int = budget.rows if len(learner.tasks) == 1 else budget.rows_of_joint
    return rows


def _validation_loss(
    model: StudyModel,
    learner: Learner,
    validation: Mapping[str, Sequence[Prompt]],
    losses: Losses,
    done: Callable[[int], None],
) -> float:
    means = []
    for task in learner.tasks:
        prompts = sorted(validation[task], key=lambda each: len(each.ids))
        model.rt.set_adapter(model.worn(learner.name, learner.name, task))
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(prompts), BATCH):
                batch = prompts[start : start + BATCH]
                total += float(losses(batch, task).sum())
                done(sum(len(each.ids) for each in batch) // TRAINING_COST)
        means.append(total / len(prompts))
    return sum(means) / len(means)
