"""Tuning k and v projections and the first MLP matrices whose weights are quantised; torch's way dequantises before."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ia3rt.bench.layers.case import Inputs, copies_of
from ia3rt.bench.shapes import Shape
from ia3rt.bench.tuning.operation import Operation, Run, distinct
from ia3rt.kernels.linear_quantised import dequantised, linear_quantised
from ia3rt.kernels.quantised_configs import linear_quantised_config
from ia3rt.kernels.tuned import LinearConfig, QuantisedShape, dtype_name

GROUP = 128


def _shapes(shape: Shape, dtype: torch.dtype, rows: Iterable[int]) -> Iterator[QuantisedShape]:
    widths = dict.fromkeys((shape.kv_width, shape.hidden))
    for count, N, kind in itertools.product(rows, widths, ("int8", "fp8", "int4", "gptq")):
        grouped = kind not in ("int8", "fp8")
        if shape.hidden % GROUP == 0 or not grouped:
            sizes = count, N, shape.hidden, dtype_name(dtype), kind, GROUP if grouped else 0
            yield from (QuantisedShape(*sizes, per_row) for per_row in (False, True)[: 2 if count > 1 else 1])


def _candidates(shape: QuantisedShape, arch: str, processors: int) -> list[LinearConfig | None]:
    rows, N, K, name, kind, group, per_row = shape
    dtype = getattr(torch, name)

    def default_of(rows: int) -> LinearConfig | None:
        found: LinearConfig | None = linear_quantised_config(
            rows, N, K, dtype, arch, processors, kind, group, per_row=per_row
        )
        return found

    default, base = default_of(rows), default_of(min(rows, 64))
    found = [default, None]
    if rows > 64 or base is None:
        configs: list[LinearConfig | None] = distinct(found)
        return configs
    warps = (2, 4) if rows <= 16 else (4,)
    for n, k, w, stages, splits in itertools.product((32, 64, 128), (64, 128), warps, (3, 4), (1, 2, 4, 8)):
        if splits <= max(1, K // (4 * k)):
            found.append(replace(base, block_n=n, block_k=k, num_warps=w, num_stages=stages, splits=splits))
    configs = distinct(found)
    return configs


def _runner(shape: QuantisedShape, inputs: Inputs) -> Run:
    rows, N, K, _, kind, group, per_row = shape

    def integers(dtype: torch.dtype, *sizes: int) -> torch.Tensor:
        limits = torch.iinfo(dtype)
        return torch.randint(limits.min, limits.max, sizes, dtype=dtype, device=inputs.device)

    def weight() -> tuple[Any, ...]:
        if kind == "int8":
            return integers(torch.int8, N, K), inputs.randn(N).float(), None, None
        if kind == "fp8":
            return inputs.randn(N, K).to(torch.float8_e4m3fn), inputs.randn(N).float(), None, None
        if kind == "int4":
            return integers(torch.int8, N, K // 2), inputs.randn(K // group, N), inputs.randn(K // group, N), None
        zeros = integers(torch.int32, K // group, N // 8)
        return integers(torch.int32, K // 8, N), inputs.randn(K // group, N).half(), zeros, None

    copies = copies_of(N * K * (1 if group == 0 else 0.5), most=16)
    weights = [weight() for _ in range(copies)]
    x, l_out = inputs.randn(rows, K), inputs.site(N)
    routing = inputs.routing(rows if per_row else 1)

    def run(config: LinearConfig | None, turn: int) -> object:
        rest = None, None, l_out, *routing, kind, group
        if config is None:
            return dequantised(x, *weights[turn % copies], *rest)
        return linear_quantised(x, *weights[turn % copies], *rest, config=config)

    return run


QUANTISED = Operation("linear_quantised", _shapes, _candidates, _runner)
