"""One launch whose code is looked at, and what that code has to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SLOTS = 64


@dataclass(frozen=True)
class Case:
    """One launch, of a launcher's own choice of kernels and block sizes."""

    launch: Callable[[bool], object]
    """Calls a launcher on `empty` tensors; is told whether with vectors of IA³ or without any."""
    matrix: bool = True
    """Whether the tensor cores have to multiply."""
    library: tuple[str, ...] = ()
    """Architectures where torch multiplies, and a kernel does the rest."""
    wgmma: bool = False
    """Whether they have to by wgmma on sm_90, both operands in shared memory, in a loop that the scale leaves alone."""
    hgmma: bool = False
    """Whether they have to by wgmma on sm_90, of which some may read an operand from registers."""
    dots: int = 1
    """How many products a step of that loop adds up; each may wait once."""
    longer_loop: int = 1
    """By how many instructions that loop may be longer than without a scale: uniform registers get short."""
    max_registers: int = 240
    """The most registers a thread may have on sm_90."""
    wide_loads: int = 0
    """The fewest loads of 16 bytes on sm_90."""


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without data: no GPU need be there."""
    return torch.empty(shape, dtype=dtype, device="meta")


def site(width: int, offset: int = 0) -> Tensor:
    """Return a site's slice of the bank, fp32 [SLOTS, width], `offset` numbers behind the start of the bank's rows."""
    return empty(SLOTS, offset + width)[:, offset:]


def routing(R: int, longest: int = 8) -> tuple[Tensor, Tensor]:
    """Return a mix table with room for `longest` adapters a mix, and a route of R entries."""
    return empty(SLOTS, 2 + 2 * longest, dtype=torch.int32), empty(R, dtype=torch.int32)
