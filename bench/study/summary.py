"""From what was answered to the study's tables: by method and size of set, by task, by domain, by pair."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ia3rt.adapters.checkpoint import read_checkpoint
from ia3rt.bench.study import statistics
from ia3rt.bench.study.cells import BASE, JOINT, OWN, Cell
from ia3rt.bench.study.methods import DEFAULTS, IN_A_ROW
from ia3rt.bench.study.phases import adapter_name
from ia3rt.bench.study.statistics import Answers, Interval
from ia3rt.bench.study.tasks import TASKS
from ia3rt.cli.comparison import compare
from ia3rt.cli.inspection import describe

Row = dict[str, object]

PRODUCT = "product"


class Answered:
    """The cells of one model, as tensors of right answers [seeds, texts], a mean over sets."""

    def __init__(self, cells: Iterable[Cell], model: str) -> None:
        self.cells = [each for each in cells if each.model == model]
        self.seeds = sorted({each.seed for each in self.cells if each.phase == "alone"})
        self.main = next(each.adapters for each in self.cells if each.method == JOINT)

    @property
    def sizes(self) -> list[int]:
        """How many adapters were combined."""
        return sorted({len(each.adapters) for each in self.cells if each.phase == "test"})

    def methods(self, size: int) -> list[str]:
        """What was tested on sets of a size, in the order of testing."""
        tested = (each for each in self.cells if each.phase == "test" and len(each.adapters) == size)
        return list(dict.fromkeys(each.method for each in tested))

    def values(self, method: str, size: int) -> Mapping[str, float]:
        """The options that a method was tested with."""
        tested = (c for c in self.cells if c.phase == "test" and c.method == method and len(c.adapters) == size)
        values: Mapping[str, float] = next(tested).values
        return values

    def right(self, method: str, size: int, task: str) -> Tensor:
        """A method on all sets of a size that the task is in; of what is compared with, on the same texts."""
        if method in (OWN, BASE, JOINT):
            cells = [c for c in self.cells if c.phase == "alone" and c.method == method and c.task == task]
            texts = self.right(PRODUCT, size, task).shape[1]
            return _by_seed(cells, self.seeds)[:, :texts]
        tested = [c for c in self.cells if c.phase == "test" and c.method == method and c.task == task]
        return _by_seed([c for c in tested if len(c.adapters) == size], self.seeds)

    def answers(self, method: str, size: int) -> list[Answers]:
        """A method on each main task."""
        return [
            Answers(self.right(method, size, task), self.right(OWN, size, task), chance_of(task)) for task in self.main
        ]


def chance_of(task: str) -> float:
    """The accuracy of guessing."""
    return 1 / len(TASKS[task].labels)


def by_method(answered: Answered, draws: int = statistics.DRAWS) -> Iterator[Row]:
    """For each size and method: accuracy, share kept, and what lies between it, the product, and routing."""
    for size in answered.sizes:
        methods = answered.methods(size)
        right = {name: [each.right for each in answered.answers(name, size)] for name in (OWN, *methods, JOINT, BASE)}
        p_values = {
            name: statistics.sign_flip(right[name], right[PRODUCT], draws) for name in methods if name != PRODUCT
        }
        adjusted = statistics.holm(p_values)
        sets = len({c.adapters for c in answered.cells if c.phase == "test" and len(c.adapters) == size})
        for name in right:
            answers = answered.answers(name, size)
            yield {
                "model": answered.cells[0].model,
                "size": size,
                "method": name,
                "values": json.dumps(dict(answered.values(name, size)), sort_keys=True) if name in methods else "",
                "sets": sets,
                "texts": sum(each.right.shape[1] for each in answers),
                **_columns("accuracy", statistics.accuracy(answers, draws)),
                **_columns("kept", statistics.share_kept(answers, draws)),
                **_columns("over_product", statistics.difference(right[name], right[PRODUCT], draws)),
                "p": p_values.get(name, ""),
                "p_holm": adjusted.get(name, ""),
                **_columns("routing_over", statistics.difference(right[OWN], right[name], draws)),
            }


def by_task(answered: Answered, draws: int = statistics.DRAWS) -> Iterator[Row]:
    """For each size, method and task: accuracy, and the share kept of what the task's own adapter has."""
    for size in answered.sizes:
        for name in (OWN, *answered.methods(size), JOINT, BASE):
            for task, answers in zip(answered.main, answered.answers(name, size), strict=True):
                row: Row = {"model": answered.cells[0].model, "size": size, "method": name, "task": task}
                row |= _columns("accuracy", statistics.accuracy([answers], draws))
                own = float(answers.own.mean()) - answers.chance
                row["kept"] = (float(answers.right.mean()) - answers.chance) / own if own > 0 else ""
                yield row


def of_phase(answered: Answered, phase: str) -> Iterator[Row]:
    """For each set, method and task of a phase: accuracy on test texts, over seeds."""
    cells = [each for each in answered.cells if each.phase == phase and each.split == "test"]
    for adapters, method, task in dict.fromkeys((each.adapters, each.method, each.task) for each in cells):
        chosen = [c for c in cells if (c.adapters, c.method, c.task) == (adapters, method, task)]
        seeds = sorted({each.seed for each in chosen})
        right = _by_seed(chosen, seeds)
        yield {
            "model": chosen[0].model,
            "adapters": "+".join(adapters),
            "method": method,
            "values": json.dumps(dict(chosen[0].values), sort_keys=True),
            "task": task,
            "texts": right.shape[1],
            **_columns("accuracy", statistics.accuracy([Answers(right, right, chance_of(task))])),
        }


def by_negated(answered: Answered) -> Iterator[Row]:
    """For each negated adapter and task: accuracy without any adapter, and with it, on the same texts."""
    cells = [each for each in answered.cells if each.phase == "negate"]
    for target, task in dict.fromkeys((each.adapters, each.task) for each in cells):
        after = _by_seed([c for c in cells if (c.adapters, c.task) == (target, task)], answered.seeds)
        alone = [c for c in answered.cells if c.phase == "alone" and c.method == BASE and c.task == task]
        before = _by_seed(alone, answered.seeds)[:, : after.shape[1]]
        yield {
            "model": answered.cells[0].model,
            "negated": "+".join(target),
            "task": task,
            "texts": after.shape[1],
            "before": float(before.mean()),
            "after": float(after.mean()),
            **_columns("change", statistics.difference([after], [before])),
        }


def by_values(answered: Answered) -> Iterator[Row]:
    """For each size, method and values: mean accuracy on validation texts."""
    cells = [each for each in answered.cells if each.phase == "tuning"]

    def key(each: Cell) -> tuple[int, str, str]:
        return len(each.adapters), each.method, json.dumps(dict(each.values), sort_keys=True)

    for size, method, values in dict.fromkeys(map(key, cells)):
        tried = [each.accuracy for each in cells if key(each) == (size, method, values)]
        row: Row = {"model": answered.cells[0].model, "size": size, "method": method, "values": values}
        yield row | {"cells": len(tried), "accuracy": sum(tried) / len(tried)}


def by_default(answered: Answered, draws: int = statistics.DRAWS) -> Iterator[Row]:
    """For each size and method with two values to compare: both accuracies, and a paired test of the second's.

    P-values are corrected for all that is compared of the model.
    """
    cells = [each for each in answered.cells if each.phase == "defaults"]
    rows: list[Row] = []
    for size, method in dict.fromkeys((len(each.adapters), each.method) for each in cells):
        of_method = [each for each in cells if each.method == method and len(each.adapters) == size]

        def right(values: Mapping[str, float], of_method: Sequence[Cell] = of_method) -> list[Tensor]:
            found = [each for each in of_method if each.values == values]
            return [_by_seed([c for c in found if c.task == task], answered.seeds) for task in answered.main]

        one, other = (right(values) for values in DEFAULTS[method])
        row: Row = {"model": answered.cells[0].model, "size": size, "method": method}
        for name, values, found in zip(("usual", "other"), DEFAULTS[method], (one, other), strict=True):
            row[name] = json.dumps(dict(values), sort_keys=True)
            row[f"accuracy_of_{name}"] = float(torch.stack([each.mean() for each in found]).mean())
        row |= _columns("difference", statistics.difference(other, one, draws))
        product = [answered.right(PRODUCT, size, task) for task in answered.main]
        row |= _columns("over_product", statistics.difference(other, product, draws))
        rows.append(row | {"p": statistics.sign_flip(other, one, draws)})
    adjusted = statistics.holm({str(place): float(str(row["p"])) for place, row in enumerate(rows)})
    for place, row in enumerate(rows):
        yield row | {"p_holm": adjusted[str(place)]}


def by_pair(answered: Answered, published: Path) -> Iterator[Row]:
    """For each pair of main tasks: what `ia3rt inspect A B` says of it, and what combining costs; means over seeds.

    Args:
        answered: a model's cells.
        published: the folder of its adapters.
    """
    tested = [each for each in answered.cells if each.phase == "test" and len(each.adapters) == 2]
    for pair in dict.fromkeys(each.adapters for each in tested):
        seen = [_inspected(published, pair, seed) for seed in answered.seeds]
        row: Row = {"model": answered.cells[0].model, "pair": "+".join(pair)}
        row |= {name: sum(each[name] for each in seen) / len(seen) for name in seen[0]}
        own = sum(float(answered.right(OWN, 2, task).mean()) for task in pair) / 2
        for method in IN_A_ROW:
            scores = [each.accuracy for each in tested if each.adapters == pair and each.method == method]
            row[f"loss_of_{method}"] = own - sum(scores) / len(scores)
        yield row


FEATURES = ("cosine", "same_sign", "distance", "larger_distance")


def correlations(pairs: Sequence[Mapping[str, object]], model: str) -> Iterator[Row]:
    """Spearman's correlation of what is known of a pair beforehand and what combining it costs."""
    of_model = [row for row in pairs if row["model"] == model]
    for feature in FEATURES:
        for outcome in (f"loss_of_{method}" for method in IN_A_ROW):
            xs, ys = ([float(str(row[name])) for row in of_model] for name in (feature, outcome))
            row: Row = {"model": model, "feature": feature, "outcome": outcome, "pairs": len(xs)}
            yield row | _columns("rho", statistics.spearman(xs, ys))


def _inspected(published: Path, pair: Sequence[str], seed: int) -> dict[str, float]:
    checkpoints = {task: read_checkpoint(published / adapter_name(task, seed)) for task in pair}
    one, other = checkpoints.items()
    overall = compare(one, other).overall
    distances = [describe(each).statistics.mean_distance for each in checkpoints.values()]
    return {
        "cosine": overall.cosine or 0.0,
        "same_sign": overall.same_sign or 0.0,
        "distance": sum(distances) / 2,
        "larger_distance": max(distances),
    }


def _by_seed(cells: Sequence[Cell], seeds: Sequence[int]) -> Tensor:
    """[seeds, texts]: the share of right answers over the cells of a seed, each of the same texts."""
    by_seed = []
    for seed in seeds:
        rows = [[int(digit) for digit in each.right] for each in cells if each.seed == seed]
        by_seed.append(torch.tensor(rows, dtype=torch.float64).mean(0))
    return torch.stack(by_seed)


def _columns(name: str, interval: Interval | None) -> Row:
    numbers = ("", "", "") if interval is None else (interval.value, interval.low, interval.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), numbers, strict=True))
