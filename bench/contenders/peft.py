"""PEFT, through its own API, on the same checkpoints."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ia3rt.adapters.site import SiteKey
from ia3rt.bench.contenders.subject import InProcess, LeftOut, Way
from ia3rt.bench.models import clone
from ia3rt.bench.workshop import Workshop

MOST = 100
"""Loading an adapter takes PEFT a part of a second, and more the more there are: nobody waits for thousands."""


class Peft(InProcess):  # type: ignore[misc]
    """A PeftModel."""

    model: Any

    def wear(self, names: Sequence[str]) -> None:
        """One adapter, or several at once, which multiplies them."""
        if len(names) == 1:
            self.model.set_adapter(names[0])
        else:
            self.model.base_model.set_adapter(list(names))

    def mixed(self, ids: Tensor, worn: Sequence[str]) -> Way:
        """PEFT ignores adapter_names for IA³, so the rows of each adapter are a forward of their own."""
        return self._one_after_another(ids, worn)

    def add(self, vectors: dict[SiteKey, Tensor]) -> Way:
        """add_adapter with the configuration of the first, and set_peft_model_state_dict."""
        state = self._state(vectors)
        return self._adding(lambda name: self._add(name, state), self.model.delete_adapter)

    def delete(self, vectors: dict[SiteKey, Tensor]) -> Way:
        """delete_adapter."""
        state = self._state(vectors)
        return self._deleting(lambda name: self._add(name, state), self.model.delete_adapter)

    def load(self, folder: Path) -> Way:
        """load_adapter."""
        return self._adding(
            lambda name: self.model.load_adapter(str(folder), adapter_name=name), self.model.delete_adapter
        )

    def load_many(self, folders: dict[str, Path]) -> None:
        """load_adapter of each."""
        for name, folder in folders.items():
            self.model.load_adapter(str(folder), adapter_name=name)

    def train(self, ids: Tensor, name: str) -> Way:
        """The adapter's parameters, as set_adapter leaves them."""
        self.model.set_adapter(name)
        return self._training(ids, [parameter for parameter in self.model.parameters() if parameter.requires_grad])

    def resident_bytes(self) -> int:
        """The bytes of all ia3_l parameters."""
        return sum(p.numel() * p.element_size() for name, p in self.model.named_parameters() if ".ia3_l." in name)

    def _add(self, name: str, state: dict[str, Tensor]) -> None:
        import peft

        self.model.add_adapter(name, next(iter(self.model.peft_config.values())))
        peft.set_peft_model_state_dict(self.model, state, adapter_name=name)

    def _state(self, vectors: dict[SiteKey, Tensor]) -> dict[str, Tensor]:
        return {
            f"base_model.model.{path}.ia3_l": vector.reshape((1, -1) if side == "in" else (-1, 1))
            for (path, side), vector in vectors.items()
        }


def build(workshop: Workshop, names: Sequence[str]) -> Any:
    """A PeftModel over a model that shares all weights, with these adapters."""
    if importlib.util.find_spec("peft") is None:
        raise LeftOut("it is not installed: pip install peft")
    if len(names) > MOST:
        raise LeftOut(f"PEFT would load {len(names):,} adapters for minutes: it is timed with up to {MOST}")
    import peft

    folders = [str(workshop.adapters.folder(name)) for name in names]
    model = peft.PeftModel.from_pretrained(clone(workshop.model), folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    return model.eval()


def subject(workshop: Workshop, names: Sequence[str]) -> Peft:
    """A PeftModel with these adapters."""
    return Peft(build(workshop, names))
