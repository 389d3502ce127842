"""unpatch() gives a model with PEFT's layers back, with its adapters as they are then: PEFT says whether it is so."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from tiny import DTYPES, FAMILIES, TARGETS, logits, peft_model, peft_vectors, save_each, tiny_model, token_ids
from torch import nn

import ia3rt
from ia3rt import Mix

IDS = token_ids()
UP = {"llama": "model.layers.0.mlp.up_proj", "gpt2": "transformer.h.0.mlp.c_fc"}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def state(model: nn.Module) -> dict[str, object]:
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()},
    }


def vectors(runtime, seed=0):
    torch.manual_seed(seed)
    return {site.key: torch.rand(site.width) + 0.5 for site in runtime.sites}


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_untouched_peft_model_is_what_it_was(family, dtype):
    wrapped = peft_model(tiny_model(family, dtype), family)
    wrapped.base_model.set_adapter(["c", "d"])
    wrapped.set_requires_grad(["b", "c"], True)
    wrapped.set_requires_grad("d", False)
    wrapped.get_base_model().get_input_embeddings().requires_grad_(True)
    before, was = logits(wrapped, IDS), state(wrapped)
    values = {name: parameter.clone() for name, parameter in wrapped.named_parameters()}
    assert ia3rt.patch(wrapped, dtype=torch.bfloat16).unpatch() is wrapped
    assert state(wrapped) == was
    assert all(torch.equal(parameter, values[name]) for name, parameter in wrapped.named_parameters())
    assert torch.equal(logits(wrapped, IDS), before)
    wrapped.set_adapter("b")
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped, IDS), logits(tiny_model(family, dtype), IDS))


def test_deleted_added_trained_and_active_adapters_go_back(family, tmp_path):
    wrapped = peft_model(tiny_model(family), family)
    runtime = ia3rt.patch(wrapped)
    (parameter, *_) = runtime.train_adapter("d")
    runtime.model(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        parameter += parameter.grad
    runtime.end_training()
    runtime.delete_adapter("b")
    width = runtime.model.get_submodule(UP[family]).weight.shape[0 if family == "llama" else 1]
    runtime.add_adapter("new", vectors(runtime))
    runtime.add_adapter("wide", {(UP[family], "out"): torch.rand(width)}, {"task_type": "CAUSAL_LM"})
    runtime.set_adapter(["new", "wide", "d"])
    worn = logits(runtime.model, IDS)
    alone = {}
    for name in runtime.adapters:
        runtime.set_adapter(name)
        alone[name] = logits(runtime.model, IDS)
    runtime.set_adapter(["new", "wide", "d"])

    assert runtime.unpatch() is wrapped
    assert list(wrapped.peft_config) == ["c", "d", "new", "wide"] == list(alone)
    assert wrapped.active_adapters == ["new", "wide", "d"]
    assert torch.equal(logits(wrapped, IDS), worn)
    wrapped.save_pretrained(tmp_path)
    for name, expected in alone.items():
        wrapped.set_adapter(name)
        assert torch.equal(logits(wrapped, IDS), expected)
        loaded = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / name)
        assert torch.equal(logits(loaded, IDS), expected)
    again = ia3rt.patch(wrapped)
    assert (again.adapters, again.active_adapters) == (list(alone), ["wide"])


def test_an_adapter_that_was_replaced_under_its_name_is_the_new_one():
    wrapped = peft_model(tiny_model(), "llama")
    runtime = ia3rt.patch(wrapped)
    runtime.set_adapter(None)
    runtime.delete_adapter("b")
    runtime.add_adapter("b", {(UP["llama"], "out"): torch.rand(96), "model.layers.1.mlp.down_proj": torch.rand(96)})
    runtime.set_adapter("b")
    worn = logits(runtime.model, IDS)
    assert torch.equal(logits(runtime.unpatch(), IDS), worn)
    assert peft_vectors(wrapped, "b").keys() == {(UP["llama"], "out"), ("model.layers.1.mlp.down_proj", "in")}


def test_the_base_model_worn_is_nothing_active_and_no_adapter_lost():
    wrapped = peft_model(tiny_model(), "llama")
    wrapped.set_adapter("c")
    expected = logits(wrapped, IDS)
    runtime = ia3rt.patch(wrapped)
    runtime.set_adapter(None)
    assert torch.equal(logits(runtime.unpatch(), IDS), logits(tiny_model(), IDS))
    wrapped.set_adapter("c")
    assert torch.equal(logits(wrapped, IDS), expected)


def test_disabled_layers_stay_disabled_until_they_are_enabled():
    wrapped = peft_model(tiny_model(), "llama")
    expected = logits(wrapped, IDS)
    wrapped.base_model.disable_adapter_layers()
    ia3rt.patch(wrapped).unpatch()
    assert torch.equal(logits(wrapped, IDS), logits(tiny_model(), IDS))
    wrapped.base_model.enable_adapter_layers()
    assert torch.equal(logits(wrapped, IDS), expected)


def test_a_model_that_was_cast_meanwhile_has_its_vectors_cast():
    wrapped, other = (peft_model(tiny_model(), "llama") for _ in range(2))
    runtime = ia3rt.patch(wrapped)
    wrapped.to(torch.bfloat16)
    runtime.unpatch()
    assert torch.equal(logits(wrapped, IDS), logits(other.to(torch.bfloat16), IDS))


def _weighted(runtime):
    runtime.set_adapter({"b": 0.5, "c": 0.5})


def _by_row(runtime):
    runtime.route(["b", "c", None])


def _two_sided(runtime):
    path = "model.layers.0.mlp.down_proj"
    runtime.add_adapter("two", {(path, "in"): torch.ones(96), (path, "out"): torch.ones(64)})


def _dotted(runtime):
    runtime.add_adapter("v1.0", vectors(runtime))


def _hiding(runtime):
    runtime.add_adapter("keys", vectors(runtime))


def _other_side(runtime):
    runtime.add_adapter("other", {("model.layers.0.mlp.down_proj", "out"): torch.ones(64)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_weighted, r"0.5 b \+ 0.5 c, which PEFT's layers cannot have active: set_adapter"),
        (_by_row, "rows wear b, c, base, which PEFT's layers cannot have active"),
        (_two_sided, r"'two' has a vector for the output of 'model.layers.0.mlp.down_proj', where PEFT's layer"),
        (_dotted, "PEFT's layers cannot hold an adapter named 'v1.0'"),
        (_hiding, "PEFT's layers cannot hold an adapter named 'keys'"),
        (_other_side, r"'other' has a vector for the output of 'model.layers.0.mlp.down_proj', where PEFT's layer"),
    ],
)
def test_what_peft_cannot_hold_is_refused_and_the_runtime_goes_on(change, message):
    wrapped = peft_model(tiny_model(), "llama")
    runtime = ia3rt.patch(wrapped)
    change(runtime)
    before, adapters = logits(runtime.model, IDS), runtime.adapters
    with pytest.raises(ValueError, match=message):
        runtime.unpatch()
    assert torch.equal(logits(runtime.model, IDS), before)
    assert runtime.adapters == adapters
    runtime.set_adapter("b")
    for name in adapters[3:]:
        runtime.delete_adapter(name)
    assert runtime.unpatch() is wrapped


def test_a_layer_that_peft_does_not_wrap_leaves_the_runtime_as_it_was(monkeypatch):
    wrapped = peft_model(tiny_model(), "llama")
    runtime = ia3rt.patch(wrapped)
    runtime.delete_adapter("c")
    runtime.add_adapter("wide", {(UP["llama"], "out"): torch.rand(96)})
    runtime.set_adapter(["b", "wide"])
    before = logits(runtime.model, IDS)

    def fail(*args: object, **kwargs: object) -> None:
        raise ValueError("PEFT does not know this layer")

    with monkeypatch.context() as patched:
        patched.setattr(peft.tuners.ia3.layer.Linear, "update_layer", fail)
        with pytest.raises(ValueError, match="PEFT does not know this layer"):
            runtime.unpatch()
    assert torch.equal(logits(wrapped, IDS), before)
    assert not any("base_layer" in name for name, _ in runtime.model.named_modules())
    with pytest.raises(RuntimeError, match="out of use"):
        wrapped.set_adapter("b")
    assert runtime.unpatch() is wrapped
    assert torch.equal(logits(wrapped, IDS), before)
    assert list(wrapped.peft_config) == ["b", "d", "wide"]


@pytest.fixture
def loaded(tmp_path):
    """A model that transformers itself loaded adapters into, and a PeftModel of the same."""
    wrapped = peft_model(tiny_model(), "llama")
    model = tiny_model()
    for folder in save_each(wrapped, tmp_path):
        model.load_adapter(str(folder), f"adapter_{folder.name}")
    return model, wrapped


def _set(model: nn.Module, name: str) -> None:
    for module in model.modules():
        if hasattr(module, "ia3_l"):
            module.set_adapter(name)


def test_adapters_that_transformers_loaded_are_taken_over_and_go_back(loaded):
    model, wrapped = loaded
    _set(model, "adapter_c")
    was = state(model)
    runtime = ia3rt.patch(model)
    assert runtime.adapters == ["adapter_b", "adapter_c", "adapter_d"]
    assert runtime.active_adapters == ["adapter_c"]
    for name in "cbd":
        wrapped.set_adapter(name)
        if name != "c":
            runtime.set_adapter(f"adapter_{name}")
        assert torch.equal(logits(model, IDS), logits(wrapped, IDS))
    runtime.set_adapter("adapter_c")
    assert runtime.unpatch() is model
    assert state(model) == was
    runtime = ia3rt.patch(model)
    runtime.delete_adapter("adapter_b")
    runtime.add_adapter("more", vectors(runtime))
    runtime.set_adapter("more")
    worn = logits(model, IDS)
    runtime.unpatch()
    assert torch.equal(logits(model, IDS), worn)
    assert list(model.peft_config) == ["adapter_c", "adapter_d", "more"]
    wrapped.set_adapter("c")
    _set(model, "adapter_c")
    assert torch.equal(logits(model, IDS), logits(wrapped, IDS))


@pytest.mark.parametrize("how", ["injected", "left by a PeftModel"])
def test_adapters_without_a_peft_model_are_taken_over_and_go_back(how):
    wrapped = peft_model(tiny_model(), "llama")
    expected = logits(wrapped, IDS)
    if how == "injected":
        model = tiny_model()
        for name in "bcd":
            peft.inject_adapter_in_model(peft.IA3Config(**TARGETS["llama"]), model, name)
            peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(wrapped, adapter_name=name), name)
        _set(model, "b")
    else:
        model = wrapped.get_base_model()
        with pytest.raises(ValueError, match="pass the PeftModel itself"):
            ia3rt.patch(model)
        del wrapped
    was = state(model)
    runtime = ia3rt.patch(model)
    assert (runtime.adapters, runtime.active_adapters) == (["b", "c", "d"], ["b"])
    assert torch.equal(logits(model, IDS), expected)
    assert runtime.unpatch() is model
    assert state(model) == was
    assert torch.equal(logits(model, IDS), expected)


def test_a_model_whose_adapters_were_all_deleted_is_a_plain_one(loaded):
    model, _ = loaded
    runtime = ia3rt.patch(model)
    runtime.set_adapter(None)
    for name in runtime.adapters:
        runtime.delete_adapter(name)
    runtime.unpatch()
    assert not model._hf_peft_config_loaded and not hasattr(model, "peft_config")
    assert torch.equal(logits(model, IDS), logits(tiny_model(), IDS))


def test_a_copy_of_a_patched_peft_model_goes_back_by_itself():
    wrapped = peft_model(tiny_model(), "llama")
    runtime = ia3rt.patch(wrapped)
    before = logits(wrapped, IDS)
    copied = copy.deepcopy(wrapped)
    other = ia3rt.patch(copied)
    other.set_adapter("c")
    worn = logits(copied, IDS)
    assert other.unpatch() is copied
    assert torch.equal(logits(copied, IDS), worn)
    assert torch.equal(logits(wrapped, IDS), before)
    assert runtime.unpatch() is wrapped
    assert wrapped.active_adapters == ["b"]


def test_a_product_with_an_adapter_twice_goes_back():
    wrapped = peft_model(tiny_model(), "llama")
    runtime = ia3rt.patch(wrapped)
    runtime.set_adapter(Mix(("b", "b", "c")))
    worn = logits(wrapped, IDS)
    assert torch.equal(logits(runtime.unpatch(), IDS), worn)


def test_what_is_active_then_can_be_trained():
    wrapped = peft_model(tiny_model(), "llama", "bc")
    runtime = ia3rt.patch(wrapped)
    runtime.set_adapter("c")
    wrapped = runtime.unpatch()
    grads = {name: parameter.requires_grad for name, parameter in wrapped.named_parameters() if "ia3_l" in name}
    assert {name for name, grad in grads.items() if grad} == {name for name in grads if name.endswith(".c")}
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
