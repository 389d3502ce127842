"""Tuning the attention of a prompt. Torch's own is no candidate: a model chooses it, or this one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch

from ia3rt.bench.layers.case import Inputs
from ia3rt.bench.shapes import Shape
from ia3rt.bench.tuning.operation import Operation, Run, distinct
from ia3rt.kernels.attention import attention
from ia3rt.kernels.attention_configs import attention_config
from ia3rt.kernels.tuned import AttentionConfig, AttentionShape, dtype_name


def _shapes(shape: Shape, dtype: torch.dtype, rows: Iterable[int]) -> Iterator[AttentionShape]:
    for count in rows:
        if count > 64:
            yield AttentionShape(count, shape.heads, shape.head_dim, dtype_name(dtype))


def _candidates(shape: AttentionShape, arch: str, processors: int) -> list[AttentionConfig]:
    dtype = getattr(torch, shape.dtype)
    found = [
        attention_config(shape.rows, shape.D, dtype, arch, processors, heads=shape.heads, masked=False, plain=True)
    ]
    for block_m, block_n, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        if block_m == 128 or warps == 4:
            found.append(AttentionConfig(block_m, block_n, warps, stages))
    configs: list[AttentionConfig] = distinct(found)
    return configs


def _runner(shape: AttentionShape, inputs: Inputs) -> Run:
    rows, heads, D, _ = shape
    q, k, v = (inputs.randn(1, rows, heads, D).transpose(1, 2) for _ in range(3))
    mixes, route = inputs.routing(1)

    def run(config: AttentionConfig, turn: int) -> object:
        nothing = (None,) * 5
        return attention(q, k, v, *nothing, mixes, route, D**-0.5, True, None, None, config=config)

    return run


ATTENTION = Operation("attention", _shapes, _candidates, _runner)
