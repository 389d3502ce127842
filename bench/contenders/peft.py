"""PEFT, through its own API, on the same checkpoints."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ia3rt.adapters.site import SiteKey
from ia3rt.bench.contenders.answering import answer, read
from ia3rt.bench.contenders.questions import Questions
from ia3rt.bench.contenders.subject import LeftOut, Subject, Way
from ia3rt.bench.models import clone
from ia3rt.bench.workshop import Workshop

MOST = 100
"""Loading an adapter takes PEFT a part of a second, and more the more there are: nobody waits for thousands."""


class Peft(Subject):  # type: ignore[misc]
    """A PeftModel."""

    def wear(self, names: Sequence[str]) -> None:
        """One adapter, or several at once, which multiplies them."""
        if len(names) == 1:
            self.model.set_adapter(names[0])
        else:
            self.model.base_model.set_adapter(list(names))

    def mixed(self, ids: Tensor, worn: Sequence[str]) -> Way:
        """PEFT ignores adapter_names for IA³, so the rows of each adapter are a forward of their own."""
        rows = {name: [row for row, other in enumerate(worn) if other == name] for name in dict.fromkeys(worn)}
        parts = {name: ids[positions] for name, positions in rows.items()}
        order = torch.tensor([row for positions in rows.values() for row in positions], device=ids.device).argsort()

        def each_in_turn() -> Tensor:
            pieces = []
            for name, part in parts.items():
                self.wear((name,))
                pieces.append(self._logits(part))
            return torch.cat(pieces)[order]

        note = f"cannot mix rows: its {len(parts)} adapters run one after another"
        return Way.computing(each_in_turn, note=note)

    def document(self, questions: Questions) -> Way:
        """One row after another; where the base model reads the document, each goes on with the same cache."""

        def answers(tokens: int) -> Tensor:
            cache, kept = None, []
            if questions.once:
                with self.model.disable_adapter():
                    cache = read(self.model, questions.document)
                kept = [(layer.keys, layer.values) for layer in cache.layers]
            pieces = []
            for name, prompt in zip(questions.worn, questions.prompts.split(1), strict=True):
                for layer, (keys, values) in zip(cache.layers if cache else (), kept, strict=True):
                    layer.keys, layer.values = keys, values
                self.wear((name,))
                pieces.append(answer(self.model, prompt, tokens, cache))
            return torch.cat(pieces)

        note = f"its {len(questions.worn)} adapters answer one after another"
        return Way(lambda _: answers(questions.tokens), lambda: answers(1), note=note)

    def adder(self, vectors: dict[SiteKey, Tensor]) -> Callable[[str], object]:
        """add_adapter with the configuration of the first, and set_peft_model_state_dict."""
        import peft

        state = {
            f"base_model.model.{path}.ia3_l": vector.reshape((1, -1) if side == "in" else (-1, 1))
            for (path, side), vector in vectors.items()
        }

        def add(name: str) -> None:
            self.model.add_adapter(name, next(iter(self.model.peft_config.values())))
            peft.set_peft_model_state_dict(self.model, state, adapter_name=name)

        return add

    def loader(self, folder: Path) -> Callable[[str], object]:
        """load_adapter."""
        return lambda name: self.model.load_adapter(str(folder), adapter_name=name)

    def remove(self, name: str) -> None:
        """delete_adapter."""
        self.model.delete_adapter(name)

    def trained(self, name: str) -> Sequence[nn.Parameter]:
        """The adapter's parameters, as set_adapter leaves them."""
        self.model.set_adapter(name)
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def resident_bytes(self) -> int:
        """The bytes of all ia3_l parameters."""
        return sum(p.numel() * p.element_size() for name, p in self.model.named_parameters() if ".ia3_l." in name)


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
