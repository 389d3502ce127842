"""How a linear layer is launched: which kernel, with which block sizes, and why."""

from collections.abc import Sequence

import triton
from torch import Tensor

from ia3rt.kernels.configs import arch_of, card_of, linear_config, processors_of
from ia3rt.kernels.linear_tile import Layer
from ia3rt.kernels.linear_tma import fits_descriptors
from ia3rt.kernels.tuned import LinearConfig, linear_configs

FUSED_INPUT_ROWS = 32
"""The most rows for which the input scale is applied inside the GEMM."""

FUSED_INPUT_READS = 32
"""The most bank rows read for it beside each tile of W: more would be the traffic, and would fill shared memory."""


def fuses_input(rows: int, size: int, uniform: bool) -> bool:
    """Return whether the GEMM itself scales x, for `rows` rows and mixes of up to `size` adapters."""
    padded = 1 if uniform else max(16, triton.next_power_of_2(rows))
    return rows <= FUSED_INPUT_ROWS and size <= 8 and padded * size <= FUSED_INPUT_READS


def plan(
    x: Tensor, scales_input: bool, layers: Sequence[Layer], ys: Sequence[Tensor], uniform: bool
) -> LinearConfig | None:
    """Return the config of a launch, None where torch multiplies.

    Args:
        x: [M, K].
        scales_input: whether the kernel scales x.
        layers: one, or two that are alike.
        ys: their results [M, N].
        uniform: whether all rows wear one mix.

    """
    config: LinearConfig | None = linear_config(
        x.shape[0],
        *layers[0].weight.shape,
        x.dtype,
        arch_of(x.device),
        processors_of(x.device),
        per_row=not uniform,
        scales_input=scales_input,
        descriptors=not scales_input and fits_descriptors(x, layers, ys),
        layers=len(layers),
        card=card_of(x.device),
    )
    return config


def explain(x: Tensor, weight: Tensor, side: str, size: int, uniform: bool, layers: int) -> tuple[str, str]:
    """Return how a launch is configured and why, in words.

    Args:
        x: [M, K].
        weight: [N, K].
        side: "in" or "out", where the vector acts.
        size: the most adapters that a mix can have.
        uniform: whether all rows wear one mix.
        layers: 1, or 2 where one launch computes two layers.

    """
    fused = side == "in" and fuses_input(x.shape[0], size, uniform)
    ys = layers * [x.new_empty(x.shape[0], weight.shape[0])]
    config = plan(x, fused, layers * [Layer(weight, None, None)], ys, uniform)
    if config is None:
        where = "the vector has a pass of its own"
        faster = "torch multiplies faster"
    else:
        where = "the vector is in the epilogue"
        faster = "many rows: persistent, by tensor descriptors" if config.resident else "many rows"
        if x.shape[0] <= 64:
            faster = "few rows: W is the traffic"
        if config.splits > 1:
            faster += f", {config.splits} programs share a sum"
            where = "the vector is in the kernel that adds their parts"
    if side == "in":
        where = (
            "x is scaled inside the matmul" if fused else "x is scaled in a pass before: inside, the matmul would wait"
        )
    card = card_of(x.device)
    if card is not None and config in linear_configs(card).values():
        faster += f" (measured on {card})"
    return "torch" if config is None else config.in_words(), f"{faster}; {where}"
