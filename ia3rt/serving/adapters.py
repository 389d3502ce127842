"""The adapters of a folder that a server is to serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ia3rt.adapters.checkpoint import read_config
from ia3rt.adapters.folder import CONFIG_NAME, adapter_folders
from ia3rt.adapters.shortened import some
from ia3rt.serving.access import shown
from ia3rt.serving.limits import check_files, read_served
from ia3rt.serving.vllm.names import check_loaded_name


@dataclass(frozen=True)
class Served:
    """An adapter in a folder of its own.

    Attributes:
        name: the folder's.
        folder: where it is.
        modules: the last component of the names of the modules where it acts; empty for a LoRA.
        numbers: how many numbers it is; 0 for a LoRA.
        rank: a LoRA's; 0 for IA³.
    """

    name: str
    folder: Path
    modules: frozenset[str]
    numbers: int
    rank: int = 0


def find_adapters(folder: Path) -> tuple[list[Served], list[str]]:
    """The IA³ and LoRA adapters in a folder's folders, by name, and the paths of those one folder deeper: left out.

    Raises:
        FileNotFoundError: there is no such folder, or no adapter in it.
        ValueError: an adapter is damaged, of another kind, or its folder has a name that means a mix.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: --adapters takes one that holds a folder for each adapter")
    folders, deeper = adapter_folders(folder)
    found = [_read(child) for child in folders]
    if not found and (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{folder} is one adapter: --adapters takes the folder that holds it, {folder.parent}")
    if not found:
        there = f"; one folder deeper are {some(deeper)}" if deeper else ""
        raise FileNotFoundError(f"{folder} holds no adapter: none of its folders has an {CONFIG_NAME}{there}")
    return found, deeper


def _read(folder: Path) -> Served:
    check_loaded_name(folder.name)
    check_files(folder)
    config = read_config(folder / CONFIG_NAME)
    if config.get("peft_type") == "LORA":
        return Served(folder.name, folder.absolute(), frozenset(), 0, _rank(folder, config))
    vectors = read_served(folder, folder.name).vectors  # which refuses other kinds
    modules = frozenset(path.rpartition(".")[2] for path, _ in vectors)
    return Served(folder.name, folder.absolute(), modules, sum(vector.numel() for vector in vectors.values()))


def _rank(folder: Path, config: Mapping[str, Any]) -> int:
    """The largest rank that a LoRA has anywhere."""
    pattern = config.get("rank_pattern") or {}
    ranks: list[Any] = [config.get("r"), *(pattern.values() if isinstance(pattern, Mapping) else [None])]
    if not all(isinstance(rank, int) and not isinstance(rank, bool) and rank > 0 for rank in ranks):
        raise ValueError(
            f"{folder / CONFIG_NAME} is damaged: a LoRA's r and what its rank_pattern holds are whole numbers, "
            f"not {shown(str(config.get('r')))} and {shown(str(pattern))}"
        )
    return int(max(ranks))
