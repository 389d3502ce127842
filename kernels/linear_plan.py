"""How a linear layer is launched: which kernel, with which block sizes, and why."""

from collections.abc import Sequence

from torch import Tensor

from ia3rt.kernels.configs import arch_of, card_of, linear_config, processors_of
from ia3rt.kernels.linear_tile import Layer
from ia3rt.kernels.linear_tma import fits_descriptors
from ia3rt.kernels.tuned import LinearConfig, linear_configs


def plan(x: Tensor, has_in: bool, layers: Sequence[Layer], ys: Sequence[Tensor], per_row: bool) -> LinearConfig | None:
    """Return the config of a launch, None where torch multiplies.

    Args:
        x: [M, K].
        has_in: whether x was scaled.
        layers: one, or two that are alike.
        ys: their results [M, N].
        per_row: Routing.per_row.

    """
    scales_input = has_in and all(layer.l_out is None for layer in layers)
    config: LinearConfig | None = linear_config(
        x.shape[0],
        *layers[0].weight.shape,
        x.dtype,
        arch_of(x.device),
        processors_of(x.device),
        per_row=per_row,
        scales_input=scales_input,
        descriptors=not scales_input and fits_descriptors(x, layers, ys),
        layers=len(layers),
        card=card_of(x.device),
    )
    return config


def explain(x: Tensor, weight: Tensor, side: str, per_row: bool, layers: int) -> tuple[str, str]:
    """Return how a launch is configured and why, in words.

    Args:
        x: [M, K].
        weight: [N, K].
        side: "in" or "out", where the vector acts.
        per_row: Routing.per_row.
        layers: 1, or 2 where one launch computes two layers.

    """
    ys = layers * [x.new_empty(x.shape[0], weight.shape[0])]
    vector = None if side == "in" else x.new_empty(1, weight.shape[0])
    config = plan(x, side == "in", layers * [Layer(weight, None, vector)], ys, per_row)
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
        where = "x is scaled in a pass before: inside, the matmul would wait"
    card = card_of(x.device)
    if card is not None and config in linear_configs(card).values():
        faster += f" (measured on {card})"
    return "torch" if config is None else config.in_words(), f"{faster}; {where}"
