"""The operations of a decoder layer alone, as bench/layers has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ia3rt.bench import layers
from ia3rt.bench.captured import captured, loop
from ia3rt.bench.contenders.subject import Way
from ia3rt.bench.layers.case import ROWS, UNADAPTED
from ia3rt.bench.layers.registry import CASES
from ia3rt.bench.shapes import SHAPES, Shape
from ia3rt.bench.suites.case import Case, Suite, Ways, described
from ia3rt.bench.workshop import Workshop

TURNS = 20  # runs in one graph: over weights that take turns, since a model's other layers would empty the cache


def _cases(quick: bool) -> Iterator[Case]:
    for layer in CASES.values():
        for rows in (1, 64) if quick else ROWS:
            for mode in ("eager", "graph"):
                yield _case(layer, rows, mode)


def _case(layer: layers.case.Case, rows: int, mode: str) -> Case:
    def ways(workshop: Workshop, contenders: Sequence[str]) -> Ways:
        settings = workshop.settings
        made = Ways()
        with torch.no_grad():
            for name, way in layer.ways(_shape(workshop), rows, settings.device, settings.dtype).items():
                try:
                    run = (captured if mode == "graph" else loop)(way, TURNS)
                except Exception as error:  # as in by_subject
                    made.failed[name] = described(error)
                else:
                    made.ways[name] = Way(lambda _, run=run: _without_gradients(run))
        return made

    return Case(layer.name, {"rows": rows, "mode": mode}, ways, references=(UNADAPTED,), work=TURNS * rows, unit="rows")


def _without_gradients(run: Callable[[], object]) -> None:
    with torch.no_grad():
        run()


def _shape(workshop: Workshop) -> Shape:
    """The widths of the model's layers."""
    name = workshop.settings.model
    if name in SHAPES:
        return SHAPES[name]
    config = workshop.model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    return Shape(name, config.hidden_size, *heads, head_dim, config.intermediate_size, 1, config.vocab_size)


SUITE = Suite(
    "kernels",
    f"The operations of a layer that IA³ acts in, {TURNS} runs each: in a CUDA graph, and with what launching them "
    "costs. Here the contenders are ia3rt's fused kernels (one mix for all rows, and one a row), the layer without "
    "IA³, the vectors in a pass of their own, and PEFT.",
    _cases,
    x="rows",
    wants=lambda device: None if device.type == "cuda" else "the kernels run on a GPU only: give --device cuda",
)
