"""What adapters change: vectors as task vectors l - 1, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor


def task_vectors(vectors: Sequence[Tensor]) -> list[Tensor]:
    """τ = l - 1 of each vector (Ilharco et al. 2023, "Editing Models with Task Arithmetic", section 2).

    Args:
        vectors: [width] each, of any floating point dtype, on any device.

    Returns:
        float64 [width] each, on the CPU; exact for vectors of float32 and below.
    """
    return [vector.detach().reshape(-1).cpu().double() - 1.0 for vector in vectors]


def as_vector(change: Tensor) -> Tensor:
    """l = 1 + τ, rounded once: float32 [width] of float64 [width]."""
    return (1.0 + change).float()


def total(rows: Iterable[Tensor]) -> Tensor:
    """The sum of [width] each, one after another: a sum of torch's has the order that the machine likes."""
    first, *rest = rows
    for row in rest:
        first = first + row
    return first


def weighted_total(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_j τ_j, float64 [width]."""
    return total(weight * change for weight, change in zip(weights, changes, strict=True))
