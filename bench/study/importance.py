"""How important each number of an adapter's vectors is: its Fisher information, and how active its place is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ia3rt.adapters.site import Site, SiteKey
from ia3rt.bench.study.models import Prompt, StudyModel


def fisher_information(
    model: StudyModel, name: str, owner: str, task: str, prompts: Sequence[Prompt], done: Callable[[int], None]
) -> dict[SiteKey, Tensor]:
    """Mean squared gradients of log p(y | text) by the vectors, y drawn from the model's own p over the task's labels.

    Matena & Raffel 2022, "Merging Models with Fisher-Weighted Averaging", section 3.2, with one y for each text.

    Returns:
        float32 [width] by site.
    """
    drawing = torch.Generator().manual_seed(0)
    sums = {site.key: torch.zeros(site.width) for site in model.rt.sites}
    model.rt.set_adapter(model.worn(name, owner, task))
    model.rt.train_adapter(name)
    try:
        parameters = {site.key: _parameter(model, site, name) for site in model.rt.sites}
        for prompt in prompts:
            chances = F.log_softmax(model.label_logits([prompt], task)[0], dim=0)
            drawn = torch.multinomial(chances.detach().exp(), 1, generator=drawing)
            gradients = torch.autograd.grad(chances[drawn].sum(), list(parameters.values()))
            for key, gradient in zip(parameters, gradients, strict=True):
                sums[key] += gradient.float() ** 2
            done(len(prompt.ids))
    finally:
        model.rt.end_training()
        model.rt.set_adapter(None)
    return {key: total / len(prompts) for key, total in sums.items()}


def mean_squares(model: StudyModel, prompts: Sequence[Prompt], done: Callable[[int], None]) -> dict[SiteKey, Tensor]:
    """E[h²] of each number that a vector scales, over the tokens of texts, as the base model has them.

    Returns:
        float32 [width] by site.
    """
    sums = {site.key: torch.zeros(site.width, dtype=torch.float64) for site in model.rt.sites}
    tokens = 0
    handles = []
    model.rt.set_adapter(None)
    try:
        for site in model.rt.sites:
            layer = model.model.get_submodule(site.module)
            if site.side == "in":
                handles.append(layer.register_forward_pre_hook(_seeing_input(sums[site.key])))
            else:
                handles.append(layer.register_forward_hook(_seeing_output(sums[site.key])))
        with torch.no_grad():
            for prompt in prompts:
                model.model(**model.inputs([prompt]))  # one at a time: no padding is counted
                tokens += len(prompt.ids)
                done(len(prompt.ids))
    finally:
        for handle in handles:
            handle.remove()
    return {key: (total / tokens).float() for key, total in sums.items()}


def _parameter(model: StudyModel, site: Site, name: str) -> Tensor:
    parameter: Tensor = model.model.get_submodule(site.module).get_parameter(f"ia3_{site.side}_{name}")
    return parameter


def _seeing_input(total: Tensor) -> Callable[[Any, Any], None]:
    def see(_: Any, arguments: Any) -> None:
        total.add_(arguments[0].double().square().flatten(0, -2).sum(0))

    return see


def _seeing_output(total: Tensor) -> Callable[[Any, Any, Any], None]:
    def see(_: Any, arguments: Any, output: Tensor) -> None:
        total.add_(output.double().square().flatten(0, -2).sum(0))

    return see
