"""Tuning linear layers: k and v in one launch, and layers that scale their input."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from ia3rt.bench.layers.case import Inputs, copies_of
from ia3rt.bench.shapes import Shape
from ia3rt.bench.tuning.operation import Operation, Run, distinct
from ia3rt.kernels.configs import linear_config
from ia3rt.kernels.linear import launch, multiply
from ia3rt.kernels.linear_tile import Layer
from ia3rt.kernels.linear_tma import fits_descriptors
from ia3rt.kernels.scale import scale
from ia3rt.kernels.tuned import LinearConfig, LinearShape, dtype_name

INPUT_ROWS = 64
"""The most rows for which layers that scale their input are tuned: with more, torch multiplies."""


def _shapes(shape: Shape, dtype: torch.dtype, rows: Iterable[int]) -> Iterator[LinearShape]:
    for count, per_row in itertools.product(rows, (False, True)):
        if per_row and count == 1:
            continue
        common = dtype_name(dtype), per_row
        yield LinearShape(count, shape.kv_width, shape.hidden, *common, False, True, 2)
        if count <= INPUT_ROWS:
            yield LinearShape(count, shape.hidden, shape.intermediate, *common, True, False, 1)


def _default(shape: LinearShape, arch: str, processors: int) -> LinearConfig | None:
    found: LinearConfig | None = linear_config(
        *shape[:3],
        getattr(torch, shape.dtype),
        arch,
        processors,
        per_row=shape.per_row,
        scales_input=shape.scales_input,
        descriptors=shape.descriptors,
        layers=shape.layers,
    )
    return found


def _candidates(shape: LinearShape, arch: str, processors: int) -> list[LinearConfig | None]:
    default = _default(shape, arch, processors)
    # What the kernel would have where torch is the default: what it has with one mix, and without an input's scale.
    base = default or _default(shape._replace(per_row=False, scales_input=False), arch, processors)
    if base is None:
        return [None]
    configs: list[LinearConfig | None] = distinct(
        [default, None, *persistent(base, shape.per_row)] if base.resident else [default, None, *_few(shape, base)]
    )
    return configs


def persistent(base: LinearConfig, per_row: bool) -> Iterator[LinearConfig]:
    """Yield configs of a persistent kernel."""
    piece = 16 if per_row else base.piece
    for block_m, block_n, stages, resident in itertools.product((64, 128), (64, 128, 256), (3, 4), (1, 2)):
        sizes = dict(block_m=block_m, block_n=block_n, num_stages=stages, resident=resident)
        warps = 8 if block_m * block_n >= 128 * 128 else 4
        yield replace(base, **sizes, num_warps=warps, piece=min(block_n, piece))


def _few(shape: LinearShape, base: LinearConfig) -> Iterator[LinearConfig]:
    for block_n, block_k, stages, splits in itertools.product((32, 64, 128), (64, 128), (3, 4), (1, 2, 4, 8, 16)):
        if splits <= max(1, shape.K // (4 * block_k)):
            yield replace(base, block_n=block_n, block_k=block_k, num_stages=stages, splits=splits)


def _runner(shape: LinearShape, inputs: Inputs) -> Run:
    x = inputs.randn(shape.rows, shape.K)
    routing = inputs.routing(shape.rows if shape.per_row else 1)
    l_in = inputs.site(shape.K) if shape.scales_input else None

    def layer() -> Layer:
        l_out = None if shape.scales_input else inputs.site(shape.N)
        return Layer(inputs.randn(shape.N, shape.K), None, l_out)

    copies = copies_of(2 * shape.layers * shape.N * shape.K)
    layers = [[layer() for _ in range(shape.layers)] for _ in range(copies)]
    ys = [inputs.randn(shape.rows, shape.N) for _ in range(shape.layers)]
    assert not shape.descriptors or fits_descriptors(x, layers[0], ys)

    def run(config: LinearConfig | None, turn: int) -> None:
        chosen = layers[turn % copies]
        if config is None:
            multiply(x if l_in is None else scale(x, l_in, *routing), chosen, ys, *routing)
        else:
            launch(x, l_in, chosen, ys, *routing, config)

    return run


LINEAR = Operation("linear", _shapes, _candidates, _runner)
