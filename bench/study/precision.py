"""Whether numbers of fewer digits answer the same, and whether a mixed batch answers as each adapter alone does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ia3rt.bench.study.asking import Prompts, balanced_part
from ia3rt.bench.study.methods import BySite
from ia3rt.bench.study.models import StudyModel, score
from ia3rt.bench.study.phases import adapter_name

_NOISE = 1.96


@dataclass(frozen=True)
class Precision:
    """How two ways of computing answer the same texts.

    Attributes:
        what: the second way; the first is float32.
        texts: how many were asked.
        same: how many have the same answer.
        right: how many are right, of each way.
        speed: tokens a second of each; 0 where it was not timed.
    """

    what: str
    texts: int
    same: int
    right: tuple[int, int]
    speed: tuple[float, float]

    @property
    def is_equal_but_for_noise(self) -> bool:
        """Whether no difference is certain: as many more are right as chance makes, of the texts answered otherwise."""
        gained: int = abs(self.right[1] - self.right[0])
        chance: float = _NOISE * max(1.0, self.texts - self.same) ** 0.5
        return gained <= chance


def compare_dtypes(
    exact: StudyModel, short: StudyModel, tasks: Sequence[str], seed: int, prompts: Prompts
) -> Precision:
    """Asks validation texts, each task with its own adapter, of the model in float32 and in another dtype."""
    answers, speeds = [], []
    for model in (exact, short):
        begun, tokens, made = time.perf_counter(), 0, []
        for task in tasks:
            own = adapter_name(task, seed)
            model.rt.set_adapter(model.worn(own, own, task))
            asked = prompts[task, "validation"]
            made.append(score(model, asked, task, lambda n: None).argmax(1))
            tokens += sum(len(each.ids) for each in asked)
        model.rt.set_adapter(None)
        speeds.append(tokens / (time.perf_counter() - begun))
        answers.append(torch.cat(made))
    dtype = str(short.dtype).removeprefix("torch.")
    return _compared(f"a model in {dtype}", answers, tasks, prompts, (speeds[0], speeds[1]))


def compare_rounding(
    model: StudyModel,
    vectors: Callable[[str], BySite],
    dtype: torch.dtype,
    tasks: Sequence[str],
    seed: int,
    prompts: Prompts,
) -> Precision:
    """Asks validation texts with vectors as they were trained, and rounded to a dtype."""
    answers = []
    for rounded in (torch.float32, dtype):
        made = []
        for task in tasks:
            own = adapter_name(task, seed)
            numbers = {key: x.to(rounded).float() for key, x in vectors(own).items()}
            model.rt.add_adapter("rounded", numbers)
            model.rt.set_adapter(model.worn("rounded", own, task))
            made.append(score(model, prompts[task, "validation"], task, lambda n: None).argmax(1))
            model.rt.set_adapter(None)
            model.rt.delete_adapter("rounded")
        answers.append(torch.cat(made))
    return _compared(f"vectors in {str(dtype).removeprefix('torch.')}", answers, tasks, prompts, (0.0, 0.0))


@dataclass(frozen=True)
class Mixed:
    """One batch in which each row wears its own task's adapter, beside the same batch in which all rows wear one.

    Attributes:
        rows: how many there are.
        same: how many have the same answer.
        largest: the largest difference of a logit.
    """

    rows: int
    same: int
    largest: float


def compare_mixed(model: StudyModel, tasks: Sequence[str], seed: int, prompts: Prompts, each: int = 8) -> Mixed:
    """Asks texts of all tasks in one batch, routed; and once for each task, in the same batch worn by all rows."""
    rows = [(task, prompt) for task in tasks for prompt in balanced_part(prompts[task, "validation"], task, each)]
    batch = [prompt for _, prompt in rows]
    own = {task: model.worn(adapter_name(task, seed), adapter_name(task, seed), task) for task in tasks}
    with torch.inference_mode():
        with model.rt.route([own[task] for task, _ in rows]):
            routed = model.logits(batch)
        alone = torch.empty_like(routed)
        for task in tasks:
            model.rt.set_adapter(own[task])
            places = [place for place, (of, _) in enumerate(rows) if of == task]
            alone[places] = model.logits(batch)[places]
    model.rt.set_adapter(None)
    same = int((routed.argmax(1) == alone.argmax(1)).sum())
    return Mixed(len(rows), same, float((routed - alone).abs().max()))


def _compared(
    what: str, answers: Sequence[torch.Tensor], tasks: Sequence[str], prompts: Prompts, speed: tuple[float, float]
) -> Precision:
    labels = torch.tensor([each.label for task in tasks for each in prompts[task, "validation"]])
    exact, short = answers
    right = int((exact == labels).sum()), int((short == labels).sum())
    return Precision(what, len(labels), int((exact == short).sum()), right, speed)
