"""An operation of a decoder layer, and the ways to do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ia3rt.bench.roofline import Work
from ia3rt.bench.shapes import Shape

ROWS = (1, 16, 64, 256, 4096)
SLOTS = 64
"""The adapters in the bank of a benchmark; a batch with one mix a row wears as many of them as it has rows."""

FUSED, BY_ROW, UNADAPTED, SEPARATE = "fused", "fused, a mix a row", "unadapted", "separate scale"
"""ia3rt's kernel with one mix for all rows, and with one a row; the layer without IA³, which is what merged weights
cost too; and that with each vector multiplied in a pass of its own."""

PEFT, PEFT_COMPILED = "peft", "peft-compiled"

Way = Callable[[int], object]
"""Does the operation once; is given the turn, so that weights can be others than the cache still holds."""


@dataclass(frozen=True)
class Case:
    """One operation."""

    name: str
    work: Callable[[Shape, int], dict[str, list[Work]]]
    """By way, what each of its kernels does for that many rows in 16 bits (vectors in 32)."""
    ways: Callable[[Shape, int, torch.device, torch.dtype], dict[str, Way]]
    """By way, how it is run."""


@dataclass
class Inputs:
    """Random tensors for one case on one device."""

    device: torch.device
    dtype: torch.dtype

    def randn(self, *shape: int) -> Tensor:
        """Return a tensor whose products with another such have about unit variance."""
        values: Tensor = torch.randn(*shape, device=self.device) / shape[-1] ** 0.25
        return values.to(self.dtype)

    def site(self, width: int) -> Tensor:
        """Return a site's slice of a bank, near one, row 0 all ones: float32 [SLOTS + 1, width]."""
        bank: Tensor = torch.randn(SLOTS + 1, width, device=self.device).mul_(0.1).add_(1)
        bank[0] = 1
        return bank

    def routing(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return a mix table of single adapters, slot i wearing row i, and a route of so many rows."""
        mixes = torch.zeros(SLOTS + 1, 2 + 2 * 8, dtype=torch.int32)
        mixes[:, 1] = 1
        mixes[:, 2] = torch.arange(SLOTS + 1)
        route = 1 + torch.arange(rows, dtype=torch.int32) % SLOTS
        return mixes.to(self.device), route.to(self.device)


def vectors_bytes(width: int, rows: int, by_row: bool) -> float:
    """Return the bytes of the bank that a site of that width reads."""
    return 4.0 * width * (min(rows, SLOTS) if by_row else 1)


def peft_layers(layers: Any, targets: list[str], feedforward: list[str]) -> Any:
    """Return a module whose linear children of these names wear an IA³ adapter of PEFT's."""
    import peft

    config = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)
    wrapped = peft.inject_adapter_in_model(config, layers)
    for name, parameter in wrapped.named_parameters():
        if "ia3_l" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    return wrapped.requires_grad_(False)
