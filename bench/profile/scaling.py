"""What one multiplication by a vector costs, with its operands in the cache and after something else was there."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ia3rt.bench.interleaved import sample_interleaved
from ia3rt.bench.shapes import SMOLLM2_135M


class Cost(NamedTuple):
    """Microseconds of y.mul_(l) at a site's width, medians."""

    site: str
    dtype: str
    hot: float
    cold: float


def costs(rounds: int = 300) -> list[Cost]:
    """Of SmolLM2's sites, on one row; less what an empty call takes between the same two readings of the clock.

    Between two cold calls as much is read as a layer has weights, as it is between the same site of two layers.
    """
    shape = SMOLLM2_135M
    weights = 2 * shape.hidden * (shape.hidden + shape.kv_width) + 3 * shape.hidden * shape.intermediate
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        other = torch.randn(weights // shape.hidden, shape.hidden).to(dtype)
        x = torch.randn(1, shape.hidden).to(dtype)
        for site, width in (("k, v", shape.kv_width), ("down", shape.intermediate)):
            y, vector = torch.ones(1, 1, width, dtype=dtype), torch.rand(width)

            def multiply(_: object, y: Tensor = y, vector: Tensor = vector) -> None:
                y.mul_(vector)

            def read(_: object, x: Tensor = x, other: Tensor = other) -> None:
                functional.linear(x, other)

            medians = []
            for before in (multiply, read):  # hot, cold
                with torch.inference_mode():
                    taken = sample_interleaved({"empty": lambda _: None, "mul": multiply}, range(rounds), before=before)
                medians.append(1e6 * (statistics.median(taken["mul"]) - statistics.median(taken["empty"])))
            found.append(Cost(site, str(dtype).removeprefix("torch."), *medians))
    return found
