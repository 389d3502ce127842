"""A product whose factors have exponents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def power(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """l = sign · Π_j |l_j|^{w_j}, with the sign that the l_j share; element by element.

    The weighted geometric mean where weights sum to 1, so that a weaker adapter is nearer to 1, as a weighted sum of
    logarithms has it (Genest & Zidek 1986, "Combining Probability Distributions": the logarithmic opinion pool). All
    weights 1 are the product, where no l_j is negative. Where all are, it is their magnitudes' with the sign that they
    share, which the product of an even number of them does not have. A weight of 0 leaves an adapter out. An
    adapter that lacks the site is ones here, which are positive.

    Args:
        vectors: l, [width] each.
        weights: one each.

    Returns:
        float32 [width].

    Raises:
        ValueError: two of them have different signs, between which powers say nothing; or a 0 has a negative weight.
    """
    used = [(vector.detach().reshape(-1).cpu().double(), w) for vector, w in zip(vectors, weights, strict=True) if w]
    result = torch.ones(vectors[0].numel(), dtype=torch.float64, device="cpu")
    negative, positive = torch.zeros_like(result, dtype=torch.bool), torch.zeros_like(result, dtype=torch.bool)
    for vector, weight in used:
        if weight < 0 and (vector == 0).any():
            raise ValueError(f"a 0 has the weight {weight:g}, and no power below 0")
        negative |= vector < 0
        positive |= vector > 0
        result = result * vector.abs() ** weight
    disagree = negative & positive
    if disagree.any():
        raise ValueError(
            f"{int(disagree.sum())} of {disagree.numel()} numbers have different signs, the first number "
            f"{int(disagree.nonzero()[0])}: a power has no meaning between them; use 'delta' or 'product'"
        )
    return torch.where(negative, -result, result).float()
