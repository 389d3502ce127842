"""An average by importance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ia3rt.adapters.combining.task_vectors import as_vector, task_vectors, total, weighted_total


def fisher(vectors: Sequence[Tensor], importances: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor:
    """l = Σ_j w_j F_j l_j / Σ_j w_j F_j, element by element.

    Fisher merging (Matena & Raffel 2022, "Merging Models with Fisher-Weighted Averaging", section 2). F is the diagonal
    of the adapter's Fisher information, or any other importance: the mean of squared gradients of the log likelihood
    with respect to l. Where Σ w_j F_j is 0 nothing is important to anyone, and it is the mean by weights alone, which
    is the limit of adding one small importance to all.

    Args:
        vectors: l, [width] each.
        importances: F, [width] each, 0 or more; None for zeros, of an adapter that lacks the site.
        weights: one each, 0 or more, and not all 0: by how much each task is to count.

    Returns:
        float32 [width].
    """
    changes = task_vectors(vectors)
    by_task = [
        torch.zeros_like(change) if each is None else weight * each.detach().reshape(-1).cpu().double()
        for change, each, weight in zip(changes, importances, weights, strict=True)
    ]
    whole = total(by_task)
    averaged = total(each * change for each, change in zip(by_task, changes, strict=True)) / whole
    return as_vector(torch.where(whole > 0, averaged, weighted_total(changes, weights) / sum(weights)))
