"""PEFT's IA³ checkpoints, read and written: adapter_config.json beside adapter_model.safetensors."""

from __future__ import annotations

import json
import pickle
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from ia3rt.adapters.site import Side, Site, SiteKey, name_matches

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
_PREFIX = "base_model.model."
_SUFFIX = ".ia3_l"


@dataclass(frozen=True)
class Checkpoint:
    """An IA³ adapter as a file holds it.

    Attributes:
        vectors: by module path and side, as stored: [1, in_features] or [out_features, 1].
        config: the adapter_config.json.
    """

    vectors: dict[SiteKey, Tensor]
    config: dict[str, Any]


def read_checkpoint(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Checkpoint:
    """Reads an IA³ checkpoint that PEFT or `write_checkpoint` wrote. Nothing in it is executed.

    Args:
        path_or_hub_id: a folder, or the id of a repository on the Hugging Face Hub.
        revision: the repository's branch, tag or commit.
        subfolder: the folder inside `path_or_hub_id` that holds the adapter.
        token: the Hub token, as in huggingface_hub.

    Raises:
        FileNotFoundError: there is no adapter_config.json, or no weights beside it.
        ValueError: the adapter is of another PEFT type, or its files are damaged or hold something else.
    """
    folder = local_folder(path_or_hub_id, revision=revision, subfolder=subfolder, token=token)
    config = _read_config(folder / CONFIG_NAME)
    return Checkpoint(_read_vectors(folder, config), config)


def local_folder(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The folder that holds an adapter's files, downloaded where it is no folder here; arguments as `read_checkpoint`.

    Raises:
        FileNotFoundError: it is neither a folder nor a repository that the Hub gave.
    """
    if Path(path_or_hub_id).is_dir():
        return Path(path_or_hub_id) / (subfolder or "")
    return _download(str(path_or_hub_id), revision, subfolder, token)


def is_ia3(folder: Path) -> bool:
    """Whether a folder's adapter_config.json says that it holds an IA³ adapter."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == "IA3"


def write_checkpoint(
    path: str | Path,
    vectors: Mapping[Site, Tensor],
    module_names: Collection[str],
    config: Mapping[str, Any],
) -> None:
    """Writes a checkpoint that PEFT's `from_pretrained` and `read_checkpoint` load.

    Args:
        path: the folder, made where it is missing.
        vectors: [width] each.
        module_names: the names of all the model's modules, so that the config's names match these sites only.
        config: what the config says besides the sites: base_model_name_or_path, task_type and so on.

    Raises:
        ValueError: a module wears an input and an output vector, which PEFT's format cannot say.
    """
    sides: dict[str, Side] = {}
    for site in vectors:
        if site.path in sides:
            raise ValueError(
                f"module {site.path!r} wears a vector at its input and one at its output: PEFT's format holds one a "
                "module. Save them as two adapters"
            )
        sides[site.path] = site.side
    feedforward = [module for module, side in sides.items() if side == "in"]
    target = shortest_names(list(sides), module_names, sides)
    names = {module: name for name in target for module in sides if name_matches(module, [name])}
    tensors = {
        f"{_PREFIX}{site.path}{_SUFFIX}": vector.cpu().reshape((1, -1) if site.side == "in" else (-1, 1)).clone()
        for site, vector in vectors.items()
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        **config,
        "peft_type": "IA3",
        "target_modules": sorted(target),
        "feedforward_modules": sorted({names[module] for module in feedforward}),
        "exclude_modules": None,
        "inference_mode": True,
    }
    save_file(tensors, folder / SAFETENSORS_NAME, metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _download(repo: str, revision: str | None, subfolder: str | None, token: str | bool | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    inside = f"{subfolder}/" if subfolder else ""
    patterns = [inside + name for name in (CONFIG_NAME, SAFETENSORS_NAME, PICKLE_NAME)]
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=patterns, token=token)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{repo!r} is neither a folder here nor an adapter that the Hugging Face Hub gave: {error}"
        ) from error
    return Path(folder) / (subfolder or "")


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} holds no {CONFIG_NAME}: it is not a PEFT adapter")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "IA3":
        raise ValueError(f"{file.parent} is a PEFT adapter of type {kind!r}: ia3rt runs IA3 adapters")
    return dict(config)


def _read_vectors(folder: Path, config: Mapping[str, Any]) -> dict[SiteKey, Tensor]:
    file = folder / SAFETENSORS_NAME
    if not file.is_file():
        file = folder / PICKLE_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds neither {SAFETENSORS_NAME} nor {PICKLE_NAME}")
    tensors = _read_tensors(file)
    others = [key for key in tensors if not key.endswith(_SUFFIX)]
    if others:
        raise ValueError(
            f"{file} holds {others[0]!r}, which is no IA³ vector: ia3rt cannot run an adapter with modules_to_save"
        )
    if not tensors:
        raise ValueError(f"{file} holds no vectors")
    vectors: dict[SiteKey, Tensor] = {}
    for key, tensor in tensors.items():
        path = key.removeprefix(_PREFIX).removesuffix(_SUFFIX)
        vectors[path, _side(path, tensor, config)] = tensor
    return vectors


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.name == SAFETENSORS_NAME:
            # Four times as fast as mapping so small a file; in an order that does not change from one load to the next.
            return dict(sorted(load(file.read_bytes()).items()))
        # weights_only: a pickle that would run code is refused, never run.
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{file} is damaged or is no {file.suffix} file of tensors: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} holds no mapping of names to tensors")
    return tensors


def _side(path: str, tensor: Tensor, config: Mapping[str, Any]) -> Side:
    # The shape says what was trained. The config can be wrong: in PEFT the first adapter on a module fixes its side
    # for all later ones.
    if not tensor.is_floating_point():
        raise ValueError(f"the vector at {path!r} is of dtype {tensor.dtype}: expected a floating point one")
    if tensor.dim() == 2 and tensor.shape[0] == 1 and tensor.shape[1] != 1:
        return "in"
    if tensor.dim() == 2 and tensor.shape[1] == 1 and tensor.shape[0] != 1:
        return "out"
    if tensor.numel() == 1:
        return "in" if name_matches(path, config.get("feedforward_modules") or ()) else "out"
    raise ValueError(
        f"the vector at {path!r} has shape {tuple(tensor.shape)}: PEFT's linear layers have [1, in_features] or "
        "[out_features, 1]"
    )


def shortest_names(modules: list[str], module_names: Iterable[str], sides: Mapping[str, Side]) -> list[str]:
    """The shortest last components that mean `modules` and nothing else, and tell their sides apart."""
    others = set(module_names) - set(modules)
    for depth in range(1, max(module.count(".") for module in modules) + 1):
        names = {".".join(module.split(".")[-depth:]) for module in modules}
        if any(name_matches(other, names) for other in others):
            continue
        # PEFT compares feedforward_modules as raw endings, so `fc` there would also mean `pre_fc`.
        inputs = {name for name in names if any(sides[m] == "in" and name_matches(m, [name]) for m in modules)}
        if not any(sides[module] == "out" and module.endswith(tuple(inputs)) for module in modules):
            return sorted(names)
    return sorted(modules)
