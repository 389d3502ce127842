"""A linear layer whose weight is quantised, with its input and output scaled."""

import torch
from torch import Tensor

from ia3rt.reference._linear import linear


def nibbles(words: Tensor, dim: int) -> Tensor:
    """Return the eight nibbles, 0 to 15, of each int32 of words [A, B], side by side along `dim`; the lowest first."""
    parts = torch.stack([(words >> 4 * i) & 15 for i in range(8)], dim + 1)
    return parts.flatten(dim, dim + 1)


def dequantise(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    groups: Tensor | None,
    kind: str,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return W [N, K] in `dtype`, computed in fp32 or wider; the formats are in kernels/linear_quantised.py."""
    wide = torch.promote_types(dtype, torch.float32)
    if zeros is None:
        return (weight.to(wide) * scales.to(wide).unsqueeze(1)).to(dtype)
    if kind == "int4":
        pairs = weight.view(torch.int8)
        q = torch.stack([(pairs << 4) >> 4, pairs >> 4], -1).flatten(1).t()
    else:
        q, zeros = nibbles(weight, 0), nibbles(zeros, 1) + (kind == "gptq")
    group = torch.arange(len(q), device=q.device) // group_size if groups is None else groups
    scale, zero = scales.to(wide)[group], zeros.to(wide)[group]
    values = q.to(wide)
    return (values * scale + zero if kind == "int4" else (values - zero) * scale).t().to(dtype)


def linear_quantised(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    groups: Tensor | None,
    bias: Tensor | None,
    l_in: Tensor | None,
    l_out: Tensor | None,
    mixes: Tensor,
    route: Tensor,
    kind: str,
    group_size: int,
) -> Tensor:
    """Return s_out ∘ (W_q (s_in ∘ x) + b) for x [..., K]. W_q is rounded to x.dtype, as torchao and GPTQ do."""
    dense = dequantise(weight, scales, zeros, groups, kind, group_size, x.dtype)
    return linear(x, dense, None if bias is None else bias.to(x.dtype), l_in, l_out, mixes, route)
