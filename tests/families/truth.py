"""What a family is compared with: PEFT's model with the same adapters, and what it has none for, done by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from families.family import Family
from safetensors.torch import load_file, save_file
from tiny import peft_vectors, save_each
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

SUM = {"a": 0.6, "b": 0.7}
Outputs = dict[str, Tensor]


class Truth:
    """PEFT's model with two adapters, a and b, whose vectors are random.

    PEFT has no IA³ for experts that are one tensor a matrix: theirs are multiplied into these while they are worn.

    Attributes:
        wrapped: PEFT's model.
        folders: the files of the adapters, with the experts' vectors in them.
        keys: where the adapters act: paths and sides.
    """

    def __init__(self, family: Family, folder: Path) -> None:
        """Makes the adapters, and writes them into an empty folder."""
        self.wrapped = pefts(family)
        self.keys = {key for name in "ab" for key in peft_vectors(self.wrapped, name)}
        self.folders = save_each(self.wrapped, folder)
        self.wrapped.base_model.add_weighted_adapter(list(SUM), list(SUM.values()), "sum")
        self._experts = family.experts
        self._tensors: dict[str, Tensor] = {}
        self._vectors: dict[str, dict[str, Tensor]] = {}
        for path, tensor in self.model.named_parameters() if family.experts else ():
            if path.endswith(family.experts.name):
                self._tensors[path] = tensor.data
                self.keys.add((path, "in"))
        for seed, each in enumerate(self.folders):
            self._vectors[each.name] = self._give_experts(each / "adapter_model.safetensors", seed)

    @property
    def model(self) -> Any:
        """The model within PEFT's."""
        return self.wrapped.get_base_model()

    @contextmanager
    def wearing(self, spec: Any) -> Iterator[None]:
        """A context in which the model wears one adapter, the product of some, their `SUM`, or None."""
        if spec is not None:
            self.wrapped.base_model.set_adapter("sum" if isinstance(spec, dict) else spec)
        kept = {path: tensor.clone() for path, tensor in self._tensors.items()}
        for path, tensor in self._tensors.items():
            tensor.copy_((self._by_expert(tensor) * self._scale(path, spec)).view(tensor.shape))
        try:
            if spec is None:
                with self.wrapped.disable_adapter():
                    yield
            else:
                yield
        finally:
            for path, tensor in self._tensors.items():
                tensor.copy_(kept[path])

    def outputs(self, spec: Any, inputs: dict[str, Tensor]) -> Outputs:
        """What the model gives, wearing this."""
        with self.wearing(spec):
            return outputs(self.model, inputs)

    def _give_experts(self, file: Path, seed: int) -> dict[str, Tensor]:
        """Random vectors, [experts, 1, width], which are written into a file of PEFT's as well."""
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for path, tensor in self._tensors.items():
            by_expert = self._by_expert(tensor)
            shape = len(by_expert), 1, by_expert.shape[self._experts.dim]
            made[path] = torch.empty(shape).uniform_(0.3, 1.7, generator=generator)
        if made:
            named = {f"base_model.model.{path}.ia3_l": vector for path, vector in made.items()}
            save_file({**load_file(file), **named}, file)
        return made

    def _by_expert(self, tensor: Tensor) -> Tensor:
        """[experts, rows, columns]."""
        return tensor.view(self._experts.count or len(tensor), -1, tensor.shape[-1])

    def _scale(self, path: str, spec: Any) -> Tensor:
        a, b = (self._vectors[name][path].double() for name in "ab")
        if isinstance(spec, dict):
            scale = spec["a"] * a + spec["b"] * b
        else:
            scale = (a if "a" in (spec or ()) else 1) * (b if "b" in (spec or ()) else torch.ones_like(b))
        return scale if self._experts.dim == 2 else scale.transpose(1, 2)


def pefts(family: Family) -> peft.PeftModel:
    """PEFT's model with the two adapters."""
    names = dict(target_modules=_ending(family.out, family.into), feedforward_modules=_ending(family.into))
    wrapped = peft.get_peft_model(family.build(), peft.IA3Config(**names), "a")
    wrapped.add_adapter("b", peft.IA3Config(**names))
    randomize(wrapped)
    return wrapped.eval()


def randomize(wrapped: nn.Module) -> None:
    """Gives all of PEFT's vectors random numbers."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "ia3_l" in name:
            parameter.data = torch.empty(parameter.shape).uniform_(0.3, 1.7, generator=generator)


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Outputs:
    """Every tensor of numbers that a forward gives, by its place in the output."""
    torch.manual_seed(3)  # for what draws at random, as Reformer's hashes
    with torch.no_grad():
        found, _ = tree_flatten(model(**inputs))
    numbers = {
        str(at): x for at, x in enumerate(found) if isinstance(x, Tensor) and x.is_floating_point() and x.numel()
    }
    assert numbers and all(x.isfinite().any() for x in numbers.values())
    return numbers


def _ending(*names: str) -> str:
    """A regular expression for paths that end with these names; PEFT takes a layer whose whole path matches."""
    return rf"(.*\.)?({'|'.join(filter(None, names)) or '(?!)'})"
