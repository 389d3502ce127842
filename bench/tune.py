"""Finds the fastest block sizes of the linear layers of a model on this GPU: `python -m ia3rt.bench tune`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ia3rt.bench.captured import captured, loop
from ia3rt.bench.interleaved import time_interleaved
from ia3rt.bench.layers.case import Inputs, copies_of
from ia3rt.bench.shapes import Shape
from ia3rt.kernels.configs import linear_config
from ia3rt.kernels.linear import launch, multiply
from ia3rt.kernels.linear_tile import Layer
from ia3rt.kernels.linear_tma import fits_descriptors
from ia3rt.kernels.scale import scale
from ia3rt.kernels.tuned import ROWS, LinearConfig, LinearShape, dtype_name

GAIN = 0.97
"""What another config's time has to be below, as a share of the default's, to replace it: less is noise."""

Measure = Callable[[LinearShape, list[LinearConfig | None]], list[float]]
"""Returns the seconds of each config, infinite where the card cannot run it; None is torch's own matmul."""


def linear_shapes(shape: Shape, dtype: torch.dtype, rows: Iterable[int] = ROWS) -> Iterator[LinearShape]:
    """Yield what a model's patched layers launch: k and v in one launch, and the second MLP matrix's input scale."""
    for count, per_row in itertools.product(rows, (False, True)):
        if per_row and count == 1:
            continue
        common = dtype_name(dtype), per_row
        yield LinearShape(count, shape.kv_width, shape.hidden, *common, False, True, 2)
        if count <= 64:
            yield LinearShape(count, shape.hidden, shape.intermediate, *common, True, False, 1)


def candidates(shape: LinearShape, arch: str, processors: int) -> list[LinearConfig | None]:
    """Return the default first, then torch's matmul, then configs that may be better."""
    dtype: torch.dtype = getattr(torch, shape.dtype)
    default = linear_config(
        shape.rows,
        shape.N,
        shape.K,
        dtype,
        arch,
        processors,
        per_row=shape.per_row,
        scales_input=shape.scales_input,
        descriptors=shape.descriptors,
        layers=shape.layers,
    )
    found: dict[LinearConfig | None, None] = {default: None, None: None}
    if default is None:  # as with a mix a row, or for an input scale: what the kernel would have
        default = linear_config(
            min(shape.rows, 1024) if not shape.scales_input else shape.rows,
            shape.N,
            shape.K,
            dtype,
            arch,
            processors,
            per_row=False,
            scales_input=False,
            descriptors=shape.descriptors,
            layers=shape.layers,
        )
    if default is None:
        return list(found)
    if shape.per_row and default.resident:
        default = replace(default, piece=16)
    if default.resident:
        for block_m, block_n, stages, resident in itertools.product((64, 128), (64, 128, 256), (3, 4), (1, 2)):
            warps = 8 if block_m * block_n >= 128 * 128 else 4
            found[
                replace(
                    default,
                    block_m=block_m,
                    block_n=block_n,
                    num_stages=stages,
                    num_warps=warps,
                    resident=resident,
                    piece=min(block_n, default.piece),
                )
            ] = None
        return list(found)
    steps = max(1, shape.K // (4 * default.block_k))
    for block_n, block_k, stages, splits in itertools.product((32, 64, 128), (64, 128), (3, 4), (1, 2, 4, 8, 16)):
        if splits <= steps:
            found[replace(default, block_n=block_n, block_k=block_k, num_stages=stages, splits=splits)] = None
    return list(found)


def tune(
    shapes: Iterable[LinearShape], measure: Measure, arch: str, processors: int
) -> Iterator[tuple[LinearShape, LinearConfig | None, float]]:
    """Yield for each shape its best config, and that one's time as a share of the default's, which wins a tie."""
    for shape in shapes:
        configs = candidates(shape, arch, processors)
        times = measure(shape, configs)
        best = min(range(len(configs)), key=lambda index: times[index])
        share = times[best] / times[0]
        yield (shape, configs[best], share) if share < GAIN else (shape, configs[0], 1.0)


def measure_on(device: torch.device, rounds: int = 20, turns: int = 20) -> Measure:
    """Return what times configs on a device, in turn, on weights that take turns so that no cache holds them."""

    def measure(shape: LinearShape, configs: list[LinearConfig | None]) -> list[float]:
        inputs = Inputs(device, getattr(torch, shape.dtype))
        x = inputs.randn(shape.rows, shape.K)
        routing = inputs.routing(shape.rows if shape.per_row else 1)
        copies = copies_of(2 * shape.layers * shape.N * shape.K)
        l_in = inputs.site(shape.K) if shape.scales_input else None

        def layer() -> Layer:
            l_out = None if shape.scales_input else inputs.site(shape.N)
            return Layer(inputs.randn(shape.N, shape.K), None, l_out)

        layers = [[layer() for _ in range(shape.layers)] for _ in range(copies)]
        ys = [inputs.randn(shape.rows, shape.N) for _ in range(shape.layers)]
        assert not shape.descriptors or fits_descriptors(x, layers[0], ys)
        runs = {index: _run(x, l_in, layers, ys, routing, config) for index, config in enumerate(configs)}
        ways = {}
        for index, run in runs.items():
            try:
                ways[str(index)] = (captured if device.type == "cuda" else loop)(run, turns)
            except OutOfResources:
                continue
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        timed = time_interleaved({name: lambda _, way=way: way() for name, way in ways.items()}, rounds, wait=wait)
        return [timed[str(index)].p50 if str(index) in timed else float("inf") for index in range(len(configs))]

    return measure


def _run(
    x: Tensor,
    l_in: Tensor | None,
    layers: list[list[Layer]],
    ys: list[Tensor],
    routing: tuple[Tensor, Tensor],
    config: LinearConfig | None,
) -> Callable[[int], None]:
    def run(turn: int) -> None:
        chosen = layers[turn % len(layers)]
        if config is None:
            multiply(x if l_in is None else scale(x, l_in, *routing), chosen, ys, *routing)
        else:
            launch(x, l_in, chosen, ys, *routing, config)

    return run
