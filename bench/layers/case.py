"""An operation of a decoder layer, and the ways to do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ia3rt.bench.roofline import Card, Work, seconds
from ia3rt.bench.shapes import Shape

ROWS = (1, 16, 64, 256, 4096)
SLOTS = 64
"""The adapters in the bank of a benchmark; a batch with one mix a row wears as many of them as it has rows."""

FUSED, BY_ROW, UNADAPTED, SEPARATE = "fused", "fused, a mix a row", "unadapted", "separate scale"
"""ia3rt's kernel with one mix for all rows, and with one a row; the layer without IA³, which is what merged weights
cost too; and that with each vector multiplied in a pass of its own."""
WAYS = FUSED, BY_ROW, UNADAPTED, SEPARATE

PEFT, PEFT_COMPILED = "peft", "peft-compiled"

Way = Callable[[int], object]
"""Does the operation once; is given the turn, so that weights can be others than the cache still holds."""


@dataclass(frozen=True)
class Case:
    """One operation."""

    name: str
    works: Callable[[Shape, int], Sequence[list[Work]]]
    """For each of WAYS, what each of its kernels does for that many rows in 16 bits (vectors in 32)."""
    ways: Callable[[Shape, int, torch.device, torch.dtype], dict[str, Way]]
    """By way, how it is run."""

    def work(self, shape: Shape, rows: int) -> dict[str, list[Work]]:
        """Return by way what each of its kernels does."""
        return dict(zip(WAYS, self.works(shape, rows), strict=True))

    def predicted(self, shape: Shape, rows: int, card: Card) -> dict[str, float]:
        """Return by way the roofline's time as a ratio to the layer without IA³."""
        times = {way: seconds(work, card) for way, work in self.work(shape, rows).items()}
        return {way: time / times[UNADAPTED] for way, time in times.items()}


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

    def in_ways(
        self, rows: int, fused: Callable[[int, tuple[Tensor, Tensor]], object], unadapted: Way, separate: Way
    ) -> dict[str, Way]:
        """Return the ways that every operation has; `fused` is given the mix table and the route too."""
        one, each = self.routing(1), self.routing(rows)
        ways = lambda turn: fused(turn, one), lambda turn: fused(turn, each), unadapted, separate
        return dict(zip(WAYS, ways, strict=True))


def copies_of(size: float, most: int = 64) -> int:
    """Return how many copies of so many bytes an H100's L2 cache does not hold: other layers would have taken it."""
    return min(most, 1 + int((100 << 20) // size))


def vectors_bytes(width: int, rows: int, by_row: bool) -> float:
    """Return the bytes of the bank that a site of that width reads."""
    return 4.0 * width * (min(rows, SLOTS) if by_row else 1)


def peft_ways(layers: Sequence[nn.Module], targets: list[str], feedforward: list[str], x: Tensor) -> dict[str, Way]:
    """Return how PEFT runs layers whose linear children of these names wear an adapter of its own."""
    import peft

    config = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)
    adapted: list[Any] = [peft.inject_adapter_in_model(config, layer).requires_grad_(False) for layer in layers]
    for layer in adapted:
        for name, parameter in layer.named_parameters():
            if "ia3_l" in name:
                nn.init.normal_(parameter, 1.0, 0.1)
    compiled = torch.compile(lambda layer, x: layer(x), dynamic=False)
    return {
        PEFT: lambda turn: adapted[turn % len(adapted)](x),
        PEFT_COMPILED: lambda turn: compiled(adapted[turn % len(adapted)], x),
    }
