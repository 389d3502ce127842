"""MLPs are recognised by what they compute, and scale their second matrix's input where it is formed."""

import copy
import functools

import pytest
import torch
from mlps import IDS, MODELS, check, make, patched, truths
from tiny import logits, scaled
from torch import nn

import ia3rt
from ia3rt.modules.layer import IA3Layer
from ia3rt.modules.mlp import IA3MLP
from ia3rt.modules.mlp_forms import FORMS, form_of

ACTIVATIONS = ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "mish"]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", MODELS)
def test_the_mlps_of_each_family_are_recognised_and_right(name, backend):
    runtime = patched(make(name), backend)
    inputs = [site for site in runtime.sites if site.side == "in"]
    wearers = [module for module in runtime.model.modules() if isinstance(module, IA3MLP)]
    assert len(wearers) == len(inputs) == 2
    assert all(isinstance(runtime.model.get_submodule(site.path), IA3Layer) for site in inputs)
    check(runtime, make(name))


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_activation_is_the_models_own(name, activation):
    """On the Triton backend; one that the kernel does not know is left to torch, beside the other kernels."""
    check(patched(make(name, hidden_act=activation), "triton"), make(name, hidden_act=activation))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_mlp_that_computes_something_else_keeps_its_forward(name):
    model = make(name)
    original = next(type(module) for module in model.modules() if form_of(module))

    class Doubled(original):
        def forward(self, x):
            return 2 * super().forward(x)

    def double(any_model):
        for module in any_model.modules():
            if type(module) is original:
                module.__class__ = Doubled
        return any_model

    fresh = double(copy.deepcopy(model))
    runtime = patched(double(model))
    assert not any(isinstance(module, IA3MLP) for module in model.modules())
    check(runtime, fresh)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_forward_set_on_the_class_of_the_activation_is_not_hidden(backend, monkeypatch):
    runtime, fresh = patched(make("llama"), backend), make("llama")
    cls = type(fresh.model.layers[0].mlp.act_fn)
    kept = []

    def doubled(self, x, forward=cls.forward):
        y = 2 * forward(self, x)
        kept.append((y, y.clone()))
        return y

    monkeypatch.setattr(cls, "forward", functools.wraps(cls.forward)(doubled))
    check(runtime, fresh)
    kept.clear()
    logits(runtime.model, IDS)
    assert len(kept) == 2 and all(torch.equal(*each) for each in kept)  # what it gives may be others' too


def test_a_forward_set_on_the_instance_is_not_hidden():
    model, fresh = make("llama"), make("llama")
    for each in (model, fresh):
        mlp = each.model.layers[0].mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(torch.sin(mlp.up_proj(x)))
    runtime = ia3rt.patch(model)
    vector = torch.rand(48)
    runtime.add_adapter("b", {"model.layers.0.mlp.down_proj": vector})
    runtime.set_adapter("b")
    fresh.model.layers[0].mlp.down_proj.weight.data *= vector
    torch.testing.assert_close(logits(model, IDS), logits(fresh, IDS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("activation", ["silu", "relu", "gelu_new"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_those_of_the_scaled_weights(name, activation, backend):
    runtime = patched(make(name, hidden_act=activation), backend)
    runtime.set_adapter("b")
    truth = truths(runtime, make(name, hidden_act=activation))["b"]
    gradients = []
    for model, dtype in ((runtime.model, torch.float32), (truth, torch.float64)):
        ids = IDS.to(model.device)
        embeddings = model.get_input_embeddings()(ids).detach().to(dtype).requires_grad_()
        model(inputs_embeds=embeddings, labels=ids).loss.backward()
        gradients.append(embeddings.grad.cpu())
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-3, atol=1e-6)


def test_the_second_matrix_may_wear_an_output_vector_too():
    model = make("llama")
    runtime = patched(model)
    path = "model.layers.0.mlp.down_proj"
    vectors = {(path, "in"): torch.rand(48), (path, "out"): torch.rand(32)}
    runtime.add_adapter("both", vectors)
    runtime.set_adapter("both")
    assert isinstance(model.get_submodule(path), IA3Layer)
    truth = scaled(make("llama"), {key: vector.double() for key, vector in vectors.items()})
    torch.testing.assert_close(logits(model, IDS).double(), logits(truth, IDS), rtol=1e-4, atol=1e-5)
    runtime.unpatch()
    assert torch.equal(logits(model, IDS), logits(make("llama"), IDS))


def test_the_forms_are_told_apart():
    codes = {(form.forward.__code__.co_code, form.forward.__code__.co_names) for form in FORMS}
    assert len(codes) == len(FORMS)
    assert form_of(nn.Linear(2, 2)) is None
