"""Task arithmetic beyond the weighted sum: forgetting, and analogies."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ia3rt.adapters.combining.task_vectors import as_vector, task_vectors, weighted_total


def negate(vector: Tensor, weight: float) -> Tensor:
    """l' = 1 - w τ: away from what the adapter does, as far as it went towards it where w = 1.

    Forgetting via negation (Ilharco et al. 2023, "Editing Models with Task Arithmetic", sections 2 and 3). It is not
    the inverse scale 1 / l, and takes an l above 2 below 0.

    Args:
        vector: l, [width].
        weight: w.

    Returns:
        float32 [width].
    """
    return as_vector(weighted_total(task_vectors([vector]), [-weight]))


def analogy(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """l_D = 1 + w_C τ_C + w_B τ_B - w_A τ_A: "A is to B as C is to D", of which A, B and C are given, in this order.

    Ilharco et al. 2023, "Editing Models with Task Arithmetic", sections 2 and 5: τ_C + (τ_B - τ_A), where all weights
    are 1.

    Args:
        vectors: l of A, B and C, [width] each.
        weights: one each.

    Returns:
        float32 [width].
    """
    a, b, c = weights
    return as_vector(weighted_total(task_vectors(vectors), [-a, b, c]))
