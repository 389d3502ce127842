"""Selective activation checkpointing keeps what some operations gave and computes the rest again, in a backward pass.

The truth is the gradient without any checkpointing.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny import patched, tiny_model, token_ids
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

IDS = token_ids()
MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def policy(_: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in MATMULS else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_blocks(model: nn.Module) -> None:
    contexts = partial(create_selective_checkpoint_contexts, policy)
    for block in model.model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize("mix", ["a", {"a": 0.7, "b": 0.6}, ["a", "b", None]], ids=str)
@pytest.mark.parametrize("trains", [True, False], ids=["vectors", "weights"])
def test_gradients_are_those_without_it(mix, trains) -> None:
    runtime = patched(tiny_model())
    model = runtime.model
    parameters = runtime.train_adapter("a") if trains else list(model.model.layers.parameters())
    if isinstance(mix, list):
        runtime.route(mix)
    else:
        runtime.set_adapter(mix)

    def gradients() -> list[Tensor]:
        model(IDS)
        loss = model(IDS, labels=IDS, use_cache=False).loss
        return torch.autograd.grad(loss, parameters)

    right = gradients()
    checkpoint_blocks(model)
    for got, expected in zip(gradients(), right, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
