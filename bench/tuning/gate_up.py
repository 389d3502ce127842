"""Tuning the first half of an MLP; torch's way is two matmuls and the activation's kernel."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from ia3rt.bench.layers.case import Inputs, copies_of
from ia3rt.bench.shapes import Shape
from ia3rt.bench.tuning.linear import persistent
from ia3rt.bench.tuning.operation import Operation, Run, distinct
from ia3rt.kernels.activation import activation
from ia3rt.kernels.configs import gate_up_config
from ia3rt.kernels.gate_up import gate_up
from ia3rt.kernels.tuned import GateUpShape, LinearConfig, dtype_name


def _shapes(shape: Shape, dtype: torch.dtype, rows: Iterable[int]) -> Iterator[GateUpShape]:
    for count, per_row in itertools.product(rows, (False, True)):
        if not (per_row and count == 1):
            yield GateUpShape(count, shape.intermediate, shape.hidden, dtype_name(dtype), True, per_row, True)


def _default(shape: GateUpShape, arch: str, processors: int) -> LinearConfig | None:
    flags = dict(gated=shape.gated, per_row=shape.per_row, two_mixes=False, descriptors=shape.descriptors)
    found: LinearConfig | None = gate_up_config(*shape[:3], getattr(torch, shape.dtype), arch, processors, **flags)
    return found


def _candidates(shape: GateUpShape, arch: str, processors: int) -> list[LinearConfig | None]:
    default = _default(shape, arch, processors)
    base = default or _default(shape._replace(per_row=False), arch, processors)
    if base is None:
        return [None]
    if base.resident:
        others = [config for config in persistent(base, shape.per_row) if config.block_n <= 128]
    else:
        few = itertools.product((16, 32, 64), (64, 128), (3, 4))
        others = [replace(base, block_n=n, block_k=k, num_stages=stages) for n, k, stages in few]
    configs: list[LinearConfig | None] = distinct([default, None, *others])
    return configs


def _runner(shape: GateUpShape, inputs: Inputs) -> Run:
    x, l = inputs.randn(shape.rows, shape.K), inputs.site(shape.N)  # noqa: E741
    routing = inputs.routing(shape.rows if shape.per_row else 1)
    copies = copies_of(4 * shape.N * shape.K)
    weights = [tuple(inputs.randn(shape.N, shape.K) for _ in range(2)) for _ in range(copies)]

    def run(config: LinearConfig | None, turn: int) -> object:
        gate, up = weights[turn % copies]
        if config is None:
            return activation(F.linear(x, gate), F.linear(x, up), l, *routing, "silu")
        return gate_up(x, gate, None, up, None, l, *routing, "silu", config=config)

    return run


GATE_UP = Operation("gate_up", _shapes, _candidates, _runner)
