"""The adapters of a benchmark: random vectors near one, and a PEFT checkpoint of each, so that all wear the same."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import ia3rt
from ia3rt.adapters.site import SiteKey
from ia3rt.bench.models import clone

DISTINCT = 16
"""So many are different; those beyond are these again, under names of their own."""
LOW, HIGH = 0.7, 1.4  # far enough from 1 that another adapter's logits are another result


def names(count: int) -> tuple[str, ...]:
    """The names of the first adapters."""
    return tuple(f"task{position}" for position in range(count))


class AdapterSet:
    """Adapters for one model.

    Args:
        model: whose sites they fit. It is not changed.
        folder: where the checkpoints are written, when they are first asked for.
    """

    def __init__(self, model: torch.nn.Module, folder: Path) -> None:
        self._runtime = ia3rt.patch(clone(model), capacity=DISTINCT)
        self._folder = folder
        self._widths = {site.key: site.width for site in self._runtime.sites}
        self.paths = list(dict.fromkeys(site.path for site in self._runtime.sites))

    @property
    def numbers(self) -> int:
        """How many numbers an adapter is."""
        return sum(self._widths.values())

    def vectors(self, name: str) -> dict[SiteKey, Tensor]:
        """An adapter's vectors, float32 on the CPU."""
        generator = torch.Generator().manual_seed(_distinct(name))
        return {key: torch.empty(width).uniform_(LOW, HIGH, generator=generator) for key, width in self._widths.items()}

    def folder(self, name: str) -> Path:
        """The folder of an adapter's checkpoint."""
        written = f"task{_distinct(name)}"
        folder = self._folder / written
        if not folder.exists():
            self._runtime.add_adapter(written, self.vectors(name), {"task_type": "CAUSAL_LM"})
            self._runtime.save_adapter(written, folder)
            self._runtime.delete_adapter(written)
        return folder

    def own_folder(self, name: str) -> Path:
        """A folder of this adapter's own; its files are those of another that has the same numbers."""
        folder = self._folder / "own" / name
        if not folder.exists():
            folder.mkdir(parents=True)
            for file in self.folder(name).iterdir():
                (folder / file.name).hardlink_to(file)
        return folder


def _distinct(name: str) -> int:
    return int(name.removeprefix("task")) % DISTINCT
