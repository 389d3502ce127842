"""get_adapter gives an adapter's numbers and config, so that nobody needs a file to read them."""

from __future__ import annotations

import pytest
import torch
from tiny import DTYPES, FAMILIES, logits, peft_model, peft_vectors, save_each, tiny_model, token_ids

import ia3rt

IDS = token_ids()
DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["loaded", "taken over"])
def test_it_is_what_peft_holds(family, how, tmp_path):
    wrapped = peft_model(tiny_model(family), family)
    truth = {name: peft_vectors(wrapped, name) for name in "bcd"}
    if how == "loaded":
        runtime = ia3rt.patch(tiny_model(family))
        for folder in save_each(wrapped, tmp_path):
            runtime.load_adapter(folder)
    else:
        runtime = ia3rt.patch(wrapped)
    for name, vectors in truth.items():
        adapter = runtime.get_adapter(name)
        assert adapter.name == name
        assert adapter.vectors.keys() == vectors.keys()
        for key, vector in adapter.vectors.items():
            assert torch.equal(vector.double(), vectors[key])
            assert adapter.vectors[key[0]] is vector
        assert adapter.config["peft_type"] == "IA3" and adapter.config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_a_copy_that_another_runtime_takes(dtype):
    runtime = ia3rt.patch(peft_model(tiny_model(), "llama"), dtype=dtype)
    before = logits(runtime.model, IDS)
    adapter = runtime.get_adapter("b")
    other = ia3rt.patch(tiny_model(), dtype=dtype)
    other.add_adapter("b", adapter.vectors, adapter.config)
    other.set_adapter("b")
    assert torch.equal(logits(other.model, IDS), before)
    assert other.get_adapter("b").config == adapter.config
    for vector in adapter.vectors.values():
        assert vector.dtype == dtype and vector.is_leaf and not vector.requires_grad
        vector.fill_(7.0)
    adapter.config["task_type"] = "OTHER"
    runtime.set_adapter("b")
    assert torch.equal(logits(runtime.model, IDS), before)
    assert runtime.get_adapter("b").config["task_type"] == "CAUSAL_LM"


def test_it_is_what_training_made_of_it_so_far():
    runtime = ia3rt.patch(tiny_model())
    runtime.add_adapter("a")
    parameters = runtime.train_adapter("a")
    runtime.model(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for parameter in parameters:
            parameter -= parameter.grad
    for site, parameter in zip(runtime.sites, parameters, strict=True):
        assert torch.equal(runtime.get_adapter("a").vectors[site.key], parameter.detach())


def test_a_path_with_two_vectors_or_none():
    runtime = ia3rt.patch(tiny_model())
    runtime.add_adapter("a", {(DOWN, "in"): torch.rand(96), (DOWN, "out"): torch.rand(64)})
    vectors = runtime.get_adapter("a").vectors
    assert vectors[DOWN, "in"].shape == (96,) and vectors[DOWN, "out"].shape == (64,)
    with pytest.raises(KeyError, match="has two vectors: use"):
        vectors[DOWN]
    with pytest.raises(KeyError, match="lm_head"):
        vectors["lm_head"]


def test_unknown_names_and_no_names():
    runtime = ia3rt.patch(tiny_model())
    with pytest.raises(ValueError, match="unknown adapter 'x'"):
        runtime.get_adapter("x")
    for nothing in ([], ()):
        with pytest.raises(ValueError, match="use None for the base model"):
            runtime.set_adapter(nothing)


def test_a_config_is_a_copy_of_what_was_given():
    runtime, config = ia3rt.patch(tiny_model()), {"tags": ["x"]}
    runtime.add_adapter("a", None, config)
    config["tags"].append("y")
    assert runtime.get_adapter("a").config["tags"] == ["x"]
