"""What a family of the table is: its tiny model, and the inputs that such models take."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

VOCABULARY = 99
Inputs: TypeAlias = "Callable[[int], dict[str, Tensor]]"


class Experts(NamedTuple):
    """Matrices of experts that are kept as one tensor, and are scaled at their input.

    Attributes:
        name: the last parts of the tensor's path.
        dim: over which dimension of [experts, rows, columns] a vector goes.
        count: how many experts there are, where they lie below each other in one matrix.
    """

    name: str
    dim: int
    count: int = 0


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model: its class in transformers, or `package:Class`.
        inputs: for so many rows, the arguments of a forward; each row has other ones.
        out: the modules that are scaled at their output, as a regular expression for the last parts of their paths.
        into: the same of those that are scaled at their input.
        config: sizes, by the names of its config class; a dict within is for a config within.
        generates: whether `generate` is compared; None where the class says it.
        default: whether it is in the default run of the tests.
        experts: those that are scaled, where they are no modules.
        mixed: why a batch of rows that wear different adapters is refused, as a part of the sentence; None where it is
            right.
        images: whether a route of such rows has to say to which row each image belongs.
        merged: why merging is refused, as a part of the sentence; None where it is right.
        remark: what docs/models.md says of it besides.
    """

    model: str
    inputs: Inputs
    out: str
    into: str
    config: Mapping[str, Any] = field(default_factory=dict)
    generates: bool | None = None
    default: bool = False
    experts: Experts | None = None
    mixed: str | None = None
    images: bool = False
    merged: str | None = None
    remark: str = ""

    @property
    def is_installed(self) -> bool:
        """Whether the package that it is in is there."""
        return importlib.util.find_spec(self.package) is not None

    @property
    def package(self) -> str:
        """The package that it is in."""
        package, colon, _ = self.model.partition(":")
        return package if colon else "transformers"

    def build(self) -> nn.Module:
        """The model with random weights and biases, the same at each call, in evaluation mode."""
        torch.manual_seed(0)
        package = importlib.import_module(self.package)
        cls: Any = getattr(package, self.model.rpartition(":")[2])
        model = cls(**self.config) if self.package == "diffusers" else cls(_config(cls.config_class, self.config))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval()  # type: ignore[no-any-return]


def _config(cls: Any, sizes: Mapping[str, Any]) -> Any:
    sizes = copy.deepcopy(sizes)  # some configs take from what they are given
    inner = {name: sizes[name] for name, part in getattr(cls, "sub_configs", {}).items() if name in sizes}
    return cls(**{**sizes, **inner})


def numbers(*shape: int) -> Tensor:
    """Numbers, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def ids(rows: int, length: int = 7) -> Tensor:
    """Tokens, the same at each call."""
    return torch.randint(4, VOCABULARY - 4, (rows, length), generator=torch.Generator().manual_seed(1))


def text(rows: int) -> dict[str, Tensor]:
    """Tokens."""
    return dict(input_ids=ids(rows))


def long_text(rows: int) -> dict[str, Tensor]:
    """Tokens enough for windows and the like."""
    return dict(input_ids=ids(rows, 16))


def global_text(rows: int) -> dict[str, Tensor]:
    """Tokens of which the first sees all others."""
    sees = torch.zeros(rows, 16, dtype=torch.long)
    sees[:, 0] = 1
    return dict(**long_text(rows), attention_mask=torch.ones_like(sees), global_attention_mask=sees)


def both(rows: int) -> dict[str, Tensor]:
    """Tokens to read, and to go on from."""
    return dict(input_ids=ids(rows), decoder_input_ids=ids(rows, 5))


def image(rows: int) -> dict[str, Tensor]:
    """An image a row."""
    return dict(pixel_values=numbers(rows, 3, 32, 32))


def video(rows: int) -> dict[str, Tensor]:
    """Four frames a row."""
    return dict(pixel_values=numbers(rows, 4, 3, 16, 16))


def image_and_text(rows: int) -> dict[str, Tensor]:
    """An image and a sentence about it a row."""
    return dict(input_ids=ids(rows), pixel_values=numbers(rows, 3, 32, 32))


def sound(rows: int) -> dict[str, Tensor]:
    """Samples."""
    return dict(input_values=numbers(rows, 600))


def spectrum(rows: int) -> dict[str, Tensor]:
    """A spectrum and tokens to go on from."""
    return dict(input_features=numbers(rows, 8, 40), decoder_input_ids=ids(rows, 5))
