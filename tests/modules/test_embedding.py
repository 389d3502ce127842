"""An embedding's output wears a vector, which PEFT's cannot."""

from __future__ import annotations

import pytest
import torch
from tiny import logits, tiny_model, token_ids
from torch import nn

import ia3rt

PATH = "model.embed_tokens"


def truth(vector, ids):
    """A float64 model of which the embedding's rows are scaled."""
    model = tiny_model().double()
    model.get_submodule(PATH).weight.data *= vector.double()
    return logits(model, ids).float()


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(5)
    return {name: torch.empty(64).uniform_(0.5, 1.5, generator=generator) for name in "ab"}


def runtime_of(vectors):
    runtime = ia3rt.patch(tiny_model(), target_modules=["embed_tokens"])
    for name, vector in vectors.items():
        runtime.add_adapter(name, {PATH: vector})
    return runtime


def test_the_output_is_scaled_for_all_and_by_row(vectors):
    runtime, ids = runtime_of(vectors), token_ids()
    runtime.set_adapter("a")
    torch.testing.assert_close(logits(runtime.model, ids), truth(vectors["a"], ids), rtol=1e-4, atol=1e-5)
    with runtime.route(["a", None, ["a", "b"]]):
        for _ in range(2):
            mixed = logits(runtime.model, ids)
            for row, scale in enumerate((vectors["a"], torch.ones(64), vectors["a"] * vectors["b"])):
                expected = truth(scale, ids[row : row + 1])
                torch.testing.assert_close(mixed[row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_it_is_saved_loaded_and_merged(vectors, tmp_path):
    runtime, ids = runtime_of(vectors), token_ids()
    runtime.save_adapter("a", tmp_path)
    again = ia3rt.patch(tiny_model(), target_modules=["embed_tokens"])
    again.load_adapter(tmp_path, "a")
    again.set_adapter("a")
    again.merge_adapter()
    torch.testing.assert_close(logits(again.model, ids), truth(vectors["a"], ids), rtol=1e-4, atol=1e-5)
    again.unmerge_adapter()
    again.unpatch()
    assert torch.equal(logits(again.model, ids), logits(tiny_model(), ids))


def test_a_weight_that_the_output_layer_shares_is_not_merged_into(vectors):
    model = tiny_model()
    model.lm_head.weight = model.get_submodule(PATH).weight
    runtime = ia3rt.patch(model, target_modules=["embed_tokens"])
    runtime.add_adapter("a", {PATH: vectors["a"]})
    runtime.set_adapter("a")
    with pytest.raises(ValueError, match="it shares its weight with .'lm_head'"):
        runtime.merge_adapter()


def test_its_vector_is_trained(vectors):
    runtime = runtime_of({"a": vectors["a"]})
    (parameter,) = runtime.train_adapter("a")
    ids = token_ids()
    logits_ = runtime.model(ids).logits
    logits_.square().mean().backward()
    model = tiny_model().double()
    scale = vectors["a"].double().requires_grad_()
    embedded = model.get_submodule(PATH)(ids) * scale
    model(inputs_embeds=embedded).logits.square().mean().backward()
    torch.testing.assert_close(parameter.grad, scale.grad.float(), rtol=1e-3, atol=1e-5)


def test_max_norm_would_undo_a_merge():
    model, ids = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)), torch.tensor([[1, 2]])
    runtime = ia3rt.patch(model, target_modules=["0"])
    runtime.add_adapter("a", {"0": torch.full((4,), 2.0)})
    before = model(ids).clone()
    runtime.set_adapter("a")
    torch.testing.assert_close(model(ids), 2 * before)
    with pytest.raises(ValueError, match="cannot merge into '0': its Embedding has max_norm=1.0, which shortens"):
        runtime.merge_adapter()
    torch.testing.assert_close(model(ids), 2 * before)
