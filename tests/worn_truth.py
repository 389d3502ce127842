"""What a forward of a tiny model is to be, by the same model with an adapter in its weights."""

from __future__ import annotations

import torch
from tiny import scaled, tiny_model, token_ids
from torch import Tensor, nn

import ia3rt

IDS = token_ids()
NAMES = "ab"


def truth(runtime: ia3rt.Runtime, name: str) -> nn.Module:
    """A copy of the model with an adapter in its weights, in float64."""
    vectors = runtime._bank.vectors(runtime._bank.adapters[name]).items()
    return scaled(tiny_model(), {site.key: vector.double() for site, vector in vectors})


def input_gradients(model: nn.Module, ids: Tensor, backward_after=lambda: None) -> Tensor:
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss
    backward_after()
    loss.backward()
    return embeddings.grad


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-3, atol=1e-6)
