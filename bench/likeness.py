"""How far two results may lie apart that should be the same."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""As a share of their norm, by the model's dtype: another adapter's results are at a tenth or more."""


def tolerance_of(dtype: torch.dtype) -> float:
    """How far results of a model of that dtype may lie apart."""
    return TOLERANCE.get(dtype, 5e-2)


def distance(result: Tensor, truth: Tensor) -> float:
    """How far a result lies from another, as a share of its norm; infinite where they are of different shapes."""
    if result.shape != truth.shape:
        return float("inf")
    result, truth = (tensor.detach().double().cpu() for tensor in (result, truth))
    return float((result - truth).norm() / truth.norm().clamp_min(1e-12))
