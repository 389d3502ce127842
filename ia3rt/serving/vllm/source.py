"""What a LoRARequest's path says to the workers: a folder with one adapter, or a mix of several.

A request reaches the workers, which are other processes, as a name, a number and this path; and vLLM makes the path
part of the prefix cache's key. So a mix is all there: what its folders, named by content, are, and how they combine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ia3rt.adapters.bank import Bank
from ia3rt.adapters.checkpoint import is_ia3
from ia3rt.adapters.mix import Mix
from ia3rt.adapters.site import Site, SiteKey
from ia3rt.routing.composed import composed_vectors
from ia3rt.serving.limits import check_files, read_served
from ia3rt.serving.vllm.store import is_stored_name, read_stored

_PREFIX = "ia3rt-mix:"


@dataclass(frozen=True)
class Source:
    """Where a slot's numbers come from.

    Attributes:
        mix: of adapters' names.
        folders: where each of these adapters' checkpoint is.
    """

    mix: Mix
    folders: Mapping[str, str]

    def path(self) -> str:
        """The path of a LoRARequest that means this."""
        if self.mix.weights is None and len(self.mix.adapters) == 1:
            return self.folders[self.mix.adapters[0]]
        told = dict(vars(self.mix), folders=dict(self.folders))
        return _PREFIX + json.dumps(told, sort_keys=True)

    @classmethod
    def of(cls, path: str, name: str) -> Source | None:
        """What a LoRARequest's name and path mean; None where they are no IA³ adapter's, but a LoRA's.

        Raises:
            ValueError: an adapter's files are pipes or the like, or its config is damaged.
        """
        mix = cls.mix_of(path)
        if mix is not None:
            return cls(mix, json.loads(path[len(_PREFIX) :])["folders"])
        one = cls(Mix((name,)), {name: path})
        if is_stored_name(Path(path).name):  # also where it is gone
            return one
        check_files(Path(path))
        return one if is_ia3(Path(path)) else None

    @staticmethod
    def is_mix(path: str) -> bool:
        """Whether a path is one that `path` made of a mix, or looks like it."""
        return path.strip().startswith(_PREFIX)

    @staticmethod
    def mix_of(path: str) -> Mix | None:
        """The mix that a path means, or None where it is a folder."""
        if not path.startswith(_PREFIX):
            return None
        told = json.loads(path[len(_PREFIX) :])
        return Mix(told["adapters"], told["weights"], told["combination_type"])

    def vectors(self) -> dict[Site, Tensor]:
        """Reads the adapters and composes them: float32 [width] by site, of the sites where any of them acts.

        Raises:
            FileNotFoundError: a folder is not there.
            ValueError: a file is damaged, a stored copy is gone or not what was stored, an adapter has more than
                vectors, or two of them have other widths at one site.
        """
        bank = self.bank()
        return composed_vectors(bank, bank.resolve(self.mix))

    def bank(self, read: Callable[[Path, str], dict[SiteKey, Tensor]] | None = None) -> Bank:
        """Reads the adapters: float32, on the CPU. Raises what `vectors` does.

        Args:
            read: reads a folder, given an adapter's name for errors; `read_folder` by default.
        """
        bank = Bank([], torch.device("cpu"), torch.float32, len(self.folders))
        for name, folder in self.folders.items():
            found = (read or read_folder)(Path(folder), name)
            known = bank.sites
            vectors = {known.get(key) or Site(*key, tensor.numel()): tensor for key, tensor in found.items()}
            bank.add(name, vectors)
        return bank


def read_folder(folder: Path, name: str) -> dict[SiteKey, Tensor]:
    """The vectors in an adapter's folder, a stored copy or not. Raises what `Source.vectors` does."""
    return read_stored(folder) if is_stored_name(folder.name) else read_served(folder, name).vectors
