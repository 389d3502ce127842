"""Work on long rows in pieces that torch does on one thread."""

from __future__ import annotations

import torch
from torch import Tensor

# torch shares elementwise work between threads from 32,768 numbers on, and then each waits for all: where other
# processes keep the cores busy that takes a time slice of theirs, a thousand times as long as copying a row does.
_PIECE = 32_704


def pieces(whole: Tensor) -> tuple[Tensor, ...]:
    """Views of rows [..., numbers] that no threads share on a CPU; the whole elsewhere, where each is a launch."""
    return torch.split(whole, _PIECE, dim=-1) if whole.is_cpu else (whole,)
