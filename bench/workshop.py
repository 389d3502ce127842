"""What the cases of a run share: the model, its adapters, and the contenders' models."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ia3rt.bench.adapters import AdapterSet, names
from ia3rt.bench.models import build_model
from ia3rt.bench.settings import Settings

if TYPE_CHECKING:
    from ia3rt.bench.contenders.subject import Subject

Maker = Callable[["Workshop", Sequence[str]], "Subject"]
"""Makes a contender's model with adapters of these names."""


class Workshop:
    """Makes models when a case first asks for them, and keeps those of the last number of adapters.

    Args:
        settings: the run's options.
        makers: the contenders, by name.
    """

    def __init__(self, settings: Settings, makers: Mapping[str, Maker]) -> None:
        self.settings = settings
        self.folder = tempfile.TemporaryDirectory(prefix="ia3rt-bench-")
        self.model = build_model(settings)
        self.adapters = AdapterSet(self.model, Path(self.folder.name) / "adapters")
        self._makers = makers
        self._subjects: dict[tuple[str, bool], Subject] = {}
        self._key: tuple[int, str] = (0, "")

    def __enter__(self) -> Workshop:
        """The workshop."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the contenders, and removes the checkpoints."""
        self._drop()
        self.folder.cleanup()

    def ids(self, rows: int, length: int) -> Tensor:
        """Random prompts: int64 [rows, length]."""
        vocabulary = self.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(rows * 100_003 + length)
        return torch.randint(1, vocabulary, (rows, length), generator=generator).to(self.settings.device)

    def subject(
        self, contender: str, adapters: int, purpose: str = "", again: bool = False, maker: Maker | None = None
    ) -> Subject:
        """A contender's model with so many adapters.

        Args:
            contender: its name.
            adapters: how many; they are called as `adapters.names` says.
            purpose: models of one purpose are not used for another.
            again: a second model, made in the same way, is wanted.
            maker: what makes it for this purpose; None for what makes it elsewhere.
        """
        if self._key != (adapters, purpose):
            self._drop()
            self._key = adapters, purpose
        kept = contender, again
        if kept not in self._subjects:
            self._subjects[kept] = (maker or self._makers[contender])(self, names(adapters))
        return self._subjects[kept]

    def saved_model(self) -> Path:
        """A folder with the model's weights, for a contender in another process."""
        folder = Path(self.folder.name) / "model"
        if not folder.exists():
            model: Any = self.model
            model.save_pretrained(folder)
        return folder

    def _drop(self) -> None:
        for subject in self._subjects.values():
            subject.close()
        self._subjects = {}
