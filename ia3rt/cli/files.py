"""Adapters that a command is given as folders or Hub ids, and the folder that it writes one into."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from ia3rt.adapters.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from ia3rt.adapters.combining.config import combined_config
from ia3rt.adapters.keys import modules_to_save
from ia3rt.adapters.new_folder import new_folder
from ia3rt.adapters.shortened import short
from ia3rt.adapters.site import Site
from ia3rt.cli.errors import UsageError
from ia3rt.cli.progress import busy
from ia3rt.cli.stopping import ended_by_sigterm


def read_all(console: Console, paths: Sequence[str], option: str = "ADAPTER") -> dict[str, Checkpoint]:
    """The adapters by the paths that they were given by.

    Args:
        console: where to show that it is at work.
        paths: folders or Hub ids.
        option: what they were given as, for errors.

    Raises:
        UsageError: one is given twice.
        FileNotFoundError: there is no such adapter.
        ValueError: one is damaged, or of another kind.
    """
    _check_each_once(paths, option)
    with busy(console, "Reading the adapters", len(paths)) as advance:
        read = {}
        for path in paths:
            read[path] = read_checkpoint(path)
            advance()
    return read


def one_base_model(checkpoints: Mapping[str, Checkpoint], base_model: str | None) -> str | None:
    """What their config is to say that they were trained on.

    Args:
        checkpoints: the adapters.
        base_model: what the user says; None leaves it to the adapters.

    Raises:
        ValueError: they say different ones, or what is no name, and the user none.
    """
    if base_model:
        return base_model
    said = {name: checkpoint.config.get("base_model_name_or_path") for name, checkpoint in checkpoints.items()}
    for name, model in said.items():
        if model is not None and not isinstance(model, str):
            raise ValueError(
                f"the config of adapter {name!r} says base_model_name_or_path={short(model)}, which is no name of a "
                "model. Say what it was trained on: --base-model"
            )
    models = list(dict.fromkeys(model for model in said.values() if model))
    if len(models) > 1:
        named = ", ".join(f"{name!r} on {model!r}" for name, model in said.items() if model)
        raise ValueError(
            f"the adapters were trained on different models: {named}. If these are one, say by which name: --base-model"
        )
    return next(iter(models), None)


def write_new(
    path: Path, vectors: Mapping[Site, Tensor], checkpoints: Iterable[Checkpoint], base_model: str | None
) -> None:
    """Writes an adapter made of others, with their own modules, into a new folder, whole or not at all.

    Its config says what all of theirs say.

    Raises:
        FileExistsError: something is there.
        ValueError: a module wears an input and an output vector, which PEFT's format cannot say.
    """
    all_of_them = list(checkpoints)
    said = combined_config((each.config, bool(each.modules.keys() - each.unnamed)) for each in all_of_them)
    config: dict[str, Any] = {"task_type": None, **said, "base_model_name_or_path": base_model}
    modules: dict[str, dict[str, Tensor]] = {}
    unnamed: set[str] = set()
    names: dict[str, None] = {}
    for checkpoint in all_of_them:
        modules.update(checkpoint.modules)
        unnamed |= checkpoint.unnamed
        if checkpoint.modules.keys() - checkpoint.unnamed:
            names.update(dict.fromkeys(modules_to_save(checkpoint.config)))
    if names:
        config["modules_to_save"] = list(names)
    with ended_by_sigterm(), new_folder(path) as folder:
        write_checkpoint(folder, vectors, None, config, modules, unnamed)


def print_json(report: Mapping[str, Any]) -> None:
    """Writes a report to standard output, as JSON and nothing else."""
    print(json.dumps(report, indent=2), flush=True)  # what a full disk raises is raised here, and not as Python ends


def _check_each_once(paths: Sequence[str], option: str) -> None:
    """Refuses a folder that is given twice, by another path too.

    Raises:
        UsageError: one is.
    """
    seen: dict[str, str] = {}
    for path in paths:
        place = os.path.realpath(path) if os.path.isdir(path) else path  # what is no folder is a Hub id
        if place in seen:
            other = "" if seen[place] == path else f", first as {seen[place]!r}"
            raise UsageError(option, f"{path!r} is given twice{other}: give each once")
        seen[place] = path
