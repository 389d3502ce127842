"""The strongest change of each number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ia3rt.adapters.combining.task_vectors import as_vector, task_vectors


def max_abs(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """l = 1 + w_j τ_j of the adapter j with the largest |w_j τ_j|, element by element; of equal ones the first.

    MagMax's selection of maximum magnitude (Marczak et al. 2024, "MagMax: Leveraging Model Merging for Seamless
    Continual Learning"); with one weight for all, which is the paper's λ, weights have no part in the selection.

    Args:
        vectors: l, [width] each.
        weights: one each.

    Returns:
        float32 [width].
    """
    changes = [weight * change for weight, change in zip(weights, task_vectors(vectors), strict=True)]
    strongest = changes[0]
    for change in changes[1:]:
        strongest = torch.where(change.abs() > strongest.abs(), change, strongest)
    return as_vector(strongest)
