"""Writes trained adapters as others load them, each with a card that says what it is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from ia3rt.bench.study.adapters import PUBLISHED
from ia3rt.bench.study.models import StudyModel
from ia3rt.bench.study.settings import Budget
from ia3rt.bench.study.tasks import LICENCES, TASKS

_WEIGHTS = "adapter_model.safetensors"


def publish(model: StudyModel, name: str, tasks: Sequence[str], folder: Path, card: str) -> None:
    """Writes an adapter that the model has, with its head where it is of one task, and its card.

    Args:
        model: has it, as `TrainedAdapters.bring` adds it.
        name: the adapter's.
        tasks: which it learned.
        folder: is made anew.
        card: the README.md.
    """
    config = {"base_model_name_or_path": model.base, "task_type": model.task_type if len(tasks) == 1 else None}
    heads = model.parts(name, tasks)[1:] if len(tasks) == 1 else []
    own = {path: state for head in heads for path, state in model.rt.get_adapter(head).modules.items()}
    model.rt.add_adapter("published", model.rt.get_adapter(name).vectors, config, own or None)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        model.rt.save_adapter("published", folder)
    finally:
        model.rt.delete_adapter("published")
    with safe_open(folder / _WEIGHTS, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key).to(PUBLISHED) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, folder / _WEIGHTS, metadata)
    (folder / "README.md").write_text(card, "utf-8")


def card_of(
    model: StudyModel,
    name: str,
    tasks: Sequence[str],
    accuracies: Mapping[str, tuple[float, float, int]],
    seed: int,
    budget: Budget,
    length: int,
    learns_text: bool = False,
) -> str:
    """A model card.

    Args:
        model: which wears it.
        name: the adapter's.
        tasks: which it learned.
        accuracies: by task: without and with the adapter, and on how many test texts.
        seed: of its texts and their order.
        budget: how it was trained.
        length: tokens of a text that the model read.
        learns_text: whether it learned to go on with the texts, and no task.
    """
    packages = dict.fromkeys(TASKS[task].package for task in tasks)
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {model.base}",
        "tags: [ia3, peft]",
        "---",
        "",
        f"# IA³ adapter `{name}` for {model.title}",
        "",
        f"One of the adapters of ia3rt's study of ways to combine them. It learned {_learned(tasks, learns_text)}.",
        "",
        "| | |",
        "|---|---|",
    ]
    for package in packages:
        lines.append(f"| texts | the package `{_shown(package)}`, which states the licence {LICENCES[package]} |")
    lines.append(f"| the model's weights | {model.weights} |")
    rows = budget.rows if len(tasks) == 1 else budget.rows_of_joint
    trained = str(model.training_dtype).removeprefix("torch.")
    lines += [
        f"| training | {budget.steps} steps of {rows} texts a task, AdamW, learning rate {model.lr:g}, seed {seed}; "
        f"the model in {trained}, the vectors in float32 |",
        f"| numbers | {str(PUBLISHED).removeprefix('torch.')}; what the study tested are these, as they are here |",
    ]
    for task, (base, own, texts) in accuracies.items():
        said = f"accuracy {own:.3f} on {texts} test texts, {base:.3f} without the adapter"
        dtype = str(model.dtype).removeprefix("torch.")
        lines.append(f"| {task} | {said}; of the first {length} tokens of a text, by the model in {dtype} |")
    lines += ["", *_use(model, tasks, learns_text), ""]
    return "\n".join(lines)


def _learned(tasks: Sequence[str], learns_text: bool) -> str:
    if learns_text:
        return f"to go on with the texts of the task `{tasks[0]}`, without labels"
    words = [f"`{task}` ({', '.join(label.strip() for label in TASKS[task].labels)})" for task in tasks]
    return f"to say {' and '.join(words)} of a text"


def _use(model: StudyModel, tasks: Sequence[str], learns_text: bool) -> list[str]:
    code = ["```python", "rt = ia3rt.patch(model)", 'rt.load_adapter("path/of/this/folder", "mine")', "```"]
    if model.modules:
        named = ", ".join(f'{key}=r"{value}"' for key, value in model.modules.items())
        code[1] = f"rt = ia3rt.patch(model, {named})"
    if model.task_type == "SEQ_CLS":
        if len(tasks) > 1:
            return [*code, "", "Vectors only: the heads that it was trained with are not here."]
        labels = ", ".join(f"{place} {label.strip()}" for place, label in enumerate(TASKS[tasks[0]].labels))
        count = max(len(task.labels) for task in TASKS.values())
        return [*code, "", f"`model` is made with `num_labels={count}`, of which are used: {labels}."]
    if learns_text:
        return code
    prompts = "; ".join(f"`{TASKS[task].template!r}`" for task in tasks)
    return [*code, "", f"Prompts, where {{}} is the text: {prompts}. The next word is the label."]


def _shown(package: str) -> str:
    return re.sub(r"^npm:", "", package)
