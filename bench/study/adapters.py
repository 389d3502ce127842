"""The study's adapters: each trained once, kept on disk, and brought into a model as they are published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ia3rt.adapters.checkpoint import read_checkpoint
from ia3rt.adapters.site import SiteKey
from ia3rt.bench.study.models import Prompt, StudyModel
from ia3rt.bench.study.settings import Budget
from ia3rt.bench.study.store import key_of
from ia3rt.bench.study.training import Learner, Losses, Point, train

K = TypeVar("K")

PUBLISHED = torch.float16
"""The dtype of published numbers. Near 1 a bfloat16 has steps of 1/128 and 1/256, as large as what IA³ learns."""


class TrainedAdapters:
    """Adapters of one model, each in a folder of `folder`, whose name says what it was trained from.

    Args:
        folder: where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[str, Path] = {}

    def train(
        self,
        model: Callable[[], StudyModel],
        kind: tuple[str, torch.dtype, float],
        learners: Sequence[Learner],
        prompts: Mapping[tuple[str, str], Sequence[Prompt]],
        validation: Mapping[str, Sequence[Prompt]],
        budget: Budget,
        losses: Callable[[StudyModel], Losses],
        done: Callable[[int], None],
    ) -> list[Point]:
        """Trains those that are not there yet, all in one mixed batch; returns the course of all of them.

        Args:
            model: gives the model, which is asked for only where there is something to train.
            kind: the model's name, the dtype that it is trained in, and the learning rate.
            learners: whom to train.
            prompts: as `training.train`.
            validation: as `training.train`.
            budget: as `training.train`.
            losses: of a model, what is made small.
            done: as `training.train`.
        """
        folders = {
            each.name: self._folder / f"{each.name}-{self._key(each, kind, prompts, validation, budget)[:12]}"
            for each in learners
        }
        missing = [each for each in learners if not folders[each.name].exists()]
        if missing:
            trained = model()
            for each in missing:
                trained.add(each.name, each.tasks)
            points = train(trained, missing, prompts, validation, budget, losses(trained), done)
            for each in missing:
                course = [asdict(point) for point in points if point.adapter == each.name]
                self._write(trained, each, folders[each.name], course)
                for part in trained.parts(each.name, each.tasks):
                    trained.rt.delete_adapter(part)
        self._found.update(folders)
        return [Point(**point) for each in learners for point in _course(folders[each.name])]

    def bring(self, model: StudyModel, name: str, tasks: Sequence[str], dtype: torch.dtype = PUBLISHED) -> None:
        """Adds a trained adapter, with its heads, to a model, its numbers rounded to `dtype`."""
        for part in model.parts(name, tasks):
            checkpoint = read_checkpoint(self._found[name] / part)
            own = {path: _rounded(state, dtype) for path, state in checkpoint.modules.items()}
            model.rt.add_adapter(part, _rounded(checkpoint.vectors, dtype), modules=own or None)

    def numbers(self, name: str) -> dict[SiteKey, Tensor]:
        """A trained adapter's vectors as they were trained."""
        return read_checkpoint(self.vectors(name)).vectors

    def vectors(self, name: str) -> Path:
        """The folder of a trained adapter's vectors, as PEFT loads it."""
        return self._found[name] / name

    def _key(
        self,
        learner: Learner,
        kind: tuple[str, torch.dtype, float],
        prompts: Mapping[tuple[str, str], Sequence[Prompt]],
        validation: Mapping[str, Sequence[Prompt]],
        budget: Budget,
    ) -> str:
        texts = [(task, prompts[learner.name, task], validation[task]) for task in learner.tasks]
        key: str = key_of(kind, learner, budget, texts)
        return key

    def _write(self, model: StudyModel, learner: Learner, folder: Path, course: Sequence[dict[str, object]]) -> None:
        half = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(half, ignore_errors=True)
        for part in model.parts(learner.name, learner.tasks):
            model.rt.save_adapter(part, half / part)
        (half / "course.json").write_text(json.dumps(course), "utf-8")
        half.rename(folder)


def _course(folder: Path) -> list[dict[str, object]]:
    course: list[dict[str, object]] = json.loads((folder / "course.json").read_text("utf-8"))
    return course


def _rounded(tensors: Mapping[K, Tensor], dtype: torch.dtype) -> dict[K, Tensor]:
    return {name: x.to(dtype).float() for name, x in tensors.items()}
