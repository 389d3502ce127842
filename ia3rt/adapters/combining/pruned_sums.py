"""Weighted sums of pruned task vectors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ia3rt.adapters.combining.pruning import keep_largest, keep_random
from ia3rt.adapters.combining.task_vectors import as_vector, task_vectors, weighted_total


def magnitude_prune(vectors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """l = 1 + Σ_j w_j τ̂_j, with τ̂ = τ trimmed by `keep_largest`.

    PEFT's `magnitude_prune`: TIES's first step (Yadav et al. 2023, algorithm 1) and task arithmetic (Ilharco et al.
    2023).

    Args:
        vectors: l, [width] each.
        weights: one each.
        density: the share of each vector's numbers that stays, in (0, 1].

    Returns:
        float32 [width].

    Raises:
        ValueError: as `keep_largest`.
    """
    return as_vector(weighted_total([keep_largest(change, density) for change in task_vectors(vectors)], weights))


def dare_linear(vectors: Sequence[Tensor], weights: Sequence[float], density: float, keys: Sequence[str]) -> Tensor:
    """l = 1 + Σ_j w_j τ̂_j, with τ̂ = τ pruned at random and rescaled by `keep_random`.

    DARE with task arithmetic (Yu et al. 2024, "Language Models are Super Mario", sections 3.2 and 3.3), as PEFT's
    `dare_linear`. Its expectation is 1 + Σ_j w_j τ_j, which is `delta`.

    Args:
        vectors: l, [width] each.
        weights: one each.
        density: the probability of each number to stay, in (0, 1].
        keys: what each draw depends on.

    Returns:
        float32 [width].
    """
    changes = zip(task_vectors(vectors), keys, strict=True)
    return as_vector(weighted_total([keep_random(change, density, key) for change, key in changes], weights))
