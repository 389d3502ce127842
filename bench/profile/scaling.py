"""What one multiplication by a vector costs, with its operands in the cache and after something else was there."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional

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
            ways: dict[str, Callable[[], object]] = {"empty": lambda: None, "mul": partial(y.mul_, vector)}
            medians = {}
            for cold in (False, True):
                taken: dict[str, list[float]] = {name: [] for name in ways}
                order = list(ways)
                with torch.inference_mode():
                    for _ in range(rounds):
                        random.shuffle(order)
                        for name in order:
                            if cold:
                                functional.linear(x, other)
                            else:
                                ways[name]()
                            start = time.perf_counter()
                            ways[name]()
                            taken[name].append(time.perf_counter() - start)
                medians[cold] = 1e6 * (statistics.median(taken["mul"]) - statistics.median(taken["empty"]))
            found.append(Cost(site, str(dtype).removeprefix("torch."), medians[False], medians[True]))
    return found
