"""PEFT's IA³ checkpoints, read and written: adapter_config.json beside adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from ia3rt.adapters import adapterhub
from ia3rt.adapters.folder import CONFIG_NAME, PEFT_NAMES, SAFETENSORS_NAME, find_file, local_folder
from ia3rt.adapters.keys import PREFIX, SUFFIX, modules_to_save, saved_paths, sort_keys
from ia3rt.adapters.new_folder import replacing
from ia3rt.adapters.plain_file import read_plain
from ia3rt.adapters.shortened import short
from ia3rt.adapters.site import Side, Site, SiteKey
from ia3rt.adapters.site_names import config_names
from ia3rt.adapters.tensor_file import read_tensors

MOST_CONFIG = 1 << 22
"""Bytes of an adapter_config.json; PEFT's have a few hundred, and a hundred thousand where they name every module."""


@dataclass(frozen=True)
class Checkpoint:
    """An IA³ adapter as its files hold it.

    Attributes:
        vectors: by module path and side, as stored: [1, in_features] or [out_features, 1]; of a convolution
            [1, channels, 1, 1] at both sides, with a one for each dimension of its kernel; of experts that are kept as
            one tensor, by that one's path, [experts, 1, in_features] or [experts, out_features, 1].
        config: the adapter_config.json; of an AdapterHub adapter, what PEFT's would say.
        modules: the adapter's own modules, such as a classification head: their tensors by module path, then by name.
        unnamed: which of `modules` modules_to_save does not name, as it does not name saved embeddings.
        written_by: the library whose format the files have.
    """

    vectors: dict[SiteKey, Tensor]
    config: dict[str, Any]
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    unnamed: frozenset[str] = frozenset()
    written_by: Literal["PEFT", "AdapterHub"] = "PEFT"

    def vectors_alone(self, name: str) -> dict[SiteKey, Tensor]:
        """The vectors, for who can wear nothing else.

        Args:
            name: the adapter's, for the error.

        Raises:
            ValueError: there is more to wear than vectors.
        """
        if self.modules:
            raise ValueError(
                f"adapter {name!r} has its own {', '.join(map(repr, self.modules))} beside its vectors: a server wears "
                "vectors only; ia3rt.patch(model) wears both"
            )
        of_experts = next(
            (path for (path, _), vector in self.vectors.items() if vector.dim() == 3 and len(vector) > 1), None
        )
        if of_experts is not None:
            raise ValueError(
                f"adapter {name!r} has a vector for each expert of {of_experts!r}, which a server does not wear: "
                "ia3rt.patch(model) does"
            )
        return self.vectors


def read_checkpoint(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    accept: Callable[[Checkpoint], object] | None = None,
) -> Checkpoint:
    """Reads an IA³ checkpoint that PEFT, `write_checkpoint` or AdapterHub wrote. Nothing in it is executed.

    Names, dtypes and shapes decide before a number is read.

    Args:
        path_or_hub_id: a folder, or the id of a repository on the Hugging Face Hub.
        revision: the repository's branch, tag or commit.
        subfolder: the folder inside `path_or_hub_id` that holds the adapter.
        token: the Hub token, as in huggingface_hub.
        accept: is given the checkpoint before a number is read, its tensors of device meta, once for each file that it
            is in. What it raises is raised.

    Raises:
        FileNotFoundError: there is no adapter_config.json, or no weights beside it.
        ValueError: the adapter is of another kind, or its files are damaged or hold something else.
    """

    def declared(checkpoint: Checkpoint) -> None:
        if accept is not None:
            accept(checkpoint)

    folder = local_folder(path_or_hub_id, revision=revision, subfolder=subfolder, token=token)
    config = read_config(folder / CONFIG_NAME)
    if adapterhub.is_config(config):
        said = adapterhub.as_peft(config)
        vectors, modules = adapterhub.read(
            folder, config, lambda *parts: declared(Checkpoint(parts[0], said, parts[1], frozenset(), "AdapterHub"))
        )
        return Checkpoint(vectors, said, modules, frozenset(), "AdapterHub")
    kind = config.get("peft_type")
    if kind is None:
        raise ValueError(f"{folder / CONFIG_NAME} says no peft_type: it is no PEFT adapter's, and no AdapterHub one's")
    if kind != "IA3":
        raise ValueError(f"{folder} is a PEFT adapter of type {kind!r}: ia3rt runs IA3 adapters")
    file = find_file(folder, PEFT_NAMES)

    def sort(tensors: Mapping[str, Tensor]) -> Checkpoint:
        contents = sort_keys(tensors, config, str(file))
        return Checkpoint(contents.vectors, config, contents.modules, frozenset(contents.unnamed))

    return sort(read_tensors(file, lambda tensors: declared(sort(tensors))))


def is_ia3(folder: Path) -> bool:
    """Whether a folder has an adapter_config.json, and it says that it is an IA³ adapter's.

    Raises:
        ValueError: it is damaged, so that nobody can say.
    """
    try:
        config = read_config(folder / CONFIG_NAME)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return config.get("peft_type") == "IA3" or (adapterhub.is_config(config) and adapterhub.is_ia3(config))


def read_config(file: Path) -> dict[str, Any]:
    """An adapter_config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, too large, or no regular file.
    """
    text = read_plain(file, MOST_CONFIG)
    if not text.strip():
        raise ValueError(f"{file} is damaged: it is empty")
    try:
        config = json.loads(text.decode("utf-8-sig"))  # some editors begin a file with a byte order mark
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} is damaged: it holds a {type(config).__name__} and no names with values")
    return config


def write_checkpoint(
    path: str | Path,
    vectors: Mapping[Site, Tensor],
    module_names: Collection[str] | None,
    config: Mapping[str, Any],
    modules: Mapping[str, Mapping[str, Tensor]],
    unnamed: Collection[str],
) -> None:
    """Writes a checkpoint that PEFT's `from_pretrained` and `read_checkpoint` load: all of it, or nothing.

    Args:
        path: the folder, made where it is missing; an adapter that is there is replaced.
        vectors: [width] each; [width_of_one] where experts share one.
        module_names: the names of all the model's modules, so that the config's names match these sites only; None
            where no model is at hand, and the config has whole paths.
        config: what the config says besides the sites: base_model_name_or_path, task_type and so on.
        modules: the adapter's own modules, as in `Checkpoint`.
        unnamed: which of them are saved embeddings, and not for modules_to_save.

    Raises:
        ValueError: a module wears an input and an output vector, or modules_to_save would mean another module too:
            PEFT's format cannot say that. Or the config holds what JSON cannot.
        OSError: the folder cannot be written.
    """
    sides: dict[str, Side] = {}
    for site in vectors:
        if site.path in sides:
            raise ValueError(
                f"module {site.path!r} wears a vector at its input and one at its output: PEFT's format holds one a "
                "module. Save them as two adapters"
            )
        sides[site.path] = site.side
    target, feedforward = config_names(sides, module_names)
    known = modules if module_names is None else module_names
    tensors = {
        f"{PREFIX}{site.path}{SUFFIX}": _as_saved(site, vector.cpu()).clone() for site, vector in vectors.items()
    }
    for module, state in modules.items():
        # A layer that PEFT wraps holds the model's own inside, where PEFT looks for weights that were saved with it.
        inside = f"{module}.base_layer" if module in unnamed and module in sides else module
        tensors.update({f"{PREFIX}{inside}.{name}": tensor.detach().cpu().clone() for name, tensor in state.items()})
    to_save = _names_to_save([module for module in modules if module not in unnamed], known, config)
    written = {
        **config,
        "peft_type": "IA3",
        "target_modules": target,
        "feedforward_modules": feedforward,
        "exclude_modules": None,
        "modules_to_save": to_save or None,
        "inference_mode": True,
    }
    text = _as_json(written, path)
    with replacing(path) as folder:
        save_file(tensors, folder / SAFETENSORS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def _as_json(config: Mapping[str, Any], path: str | Path) -> str:
    for key, value in config.items():
        try:
            json.dumps(value, sort_keys=True)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"cannot save an adapter to {path}: its config has {short(repr(value))} at {key!r}, which JSON cannot "
                f"hold: {error}"
            ) from error
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _as_saved(site: Site, vector: Tensor) -> Tensor:
    """[1, width] at an input and [width, 1] at an output, as PEFT has them; one after another for experts.

    A convolution's is alike at both sides.
    """
    if site.spatial:
        return vector.reshape(1, -1, *(1,) * site.spatial)
    shape = (1, site.width_of_one) if site.side == "in" else (site.width_of_one, 1)
    return vector.reshape(shape if len(vector) == site.width_of_one else (site.experts, *shape))


def _names_to_save(modules: list[str], module_names: Collection[str], config: Mapping[str, Any]) -> list[str]:
    """What modules_to_save is to say, so that PEFT finds `modules` and nothing else."""
    names = list(modules_to_save(config))
    if set(modules) <= set(saved_paths(names, module_names)):
        return names  # as the config had it: what it names besides holds no tensors, or is not there
    others = set(saved_paths(modules, module_names)) - set(modules)
    if others:
        raise ValueError(
            f"cannot save an own module at {modules}: PEFT compares endings, and would take {sorted(others)} too"
        )
    return modules
