"""What PEFT and transformers offer for adapters is an error while ia3rt holds them, and never does nothing silently."""

from __future__ import annotations

import peft
import pytest
import torch
from tiny import TARGETS, generated, logits, peft_model, save_each, tiny_model, token_ids
from torch import nn

import ia3rt

IDS = token_ids()
CONFIG = peft.IA3Config(**TARGETS["llama"], task_type="CAUSAL_LM")

USES = {
    "set_adapter": (lambda model: model.set_adapter("c"), r"rt\.set_adapter\(name\)"),
    "add_adapter": (lambda model: model.add_adapter("e", CONFIG), r"rt\.add_adapter\(name\)"),
    "load_adapter": (lambda model: model.load_adapter("folder", "e"), r"rt\.load_adapter\(path, name\)"),
    "delete_adapter": (lambda model: model.delete_adapter("b"), r"rt\.delete_adapter\(name\)"),
    "save_pretrained": (lambda model: model.save_pretrained("folder"), r"rt\.save_adapter\(name, path\)"),
    "push_to_hub": (lambda model: model.push_to_hub("repository"), r"rt\.save_adapter\(name, path\)"),
    "disable_adapter": (lambda model: model.disable_adapter(), r"rt\.disable_adapter\(\)"),
    "merge_adapter": (lambda model: model.merge_adapter(), r"rt\.merge_adapter\(\)"),
    "unmerge_adapter": (lambda model: model.unmerge_adapter(), r"rt\.unmerge_adapter\(\)"),
    "merge_and_unload": (lambda model: model.merge_and_unload(), r"rt\.merge_and_unload\(\)"),
    "unload": (lambda model: model.unload(), r"rt\.unpatch\(\)"),
    "add_weighted_adapter": (
        lambda model: model.add_weighted_adapter(["b", "c"], [0.5, 0.5], "e"),
        r"rt\.add_weighted_adapter\(…\)",
    ),
    "set_requires_grad": (lambda model: model.set_requires_grad("b"), r"rt\.train_adapter\(name\)"),
    "enable_adapter_layers": (lambda model: model.enable_adapter_layers(), r"rt\.set_adapter\(name\)"),
    "disable_adapter_layers": (lambda model: model.disable_adapter_layers(), r"rt\.set_adapter\(None\)"),
    "the tuner's set_adapter": (lambda model: model.base_model.set_adapter("c"), r"rt\.set_adapter\(name\)"),
    "active_adapter": (lambda model: model.active_adapter, r"rt\.active_adapters"),
    "active_adapters": (lambda model: model.active_adapters, r"rt\.active_adapters"),
    "active_adapter, set": (lambda model: setattr(model, "active_adapter", "c"), r"rt\.active_adapters"),
    "get_layer_status": (lambda model: model.get_layer_status(), r"rt\.sites"),
    "get_model_status": (lambda model: model.get_model_status(), r"rt\.adapters"),
    "state_dict": (lambda model: model.state_dict(), r"rt\.get_adapter\(name\)"),
    "load_state_dict": (lambda model: model.load_state_dict({}, strict=False), r"rt\.load_adapter\(path, name\)"),
    "get_peft_model_state_dict": (
        lambda model: peft.get_peft_model_state_dict(model, adapter_name="b"),
        r"rt\.get_adapter\(name\)",
    ),
    "set_peft_model_state_dict": (lambda model: peft.set_peft_model_state_dict(model, {}, adapter_name="b"), "rt"),
    "adapter_names": (lambda model: model(IDS, adapter_names=["b", "c", "d"]), r"with rt\.route\(\[…\]\)"),
    "adapter_names of generate": (
        lambda model: model.generate(input_ids=IDS, adapter_names=["b"] * 3, max_new_tokens=1),
        r"with rt\.route\(\[…\]\)",
    ),
}


@pytest.fixture
def wrapped():
    return peft_model(tiny_model(), "llama")


@pytest.mark.parametrize(("use", "instead"), USES.values(), ids=USES)
def test_a_peft_model_says_what_to_call_instead(wrapped, use, instead, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runtime = ia3rt.patch(wrapped)
    before = logits(wrapped, IDS)
    with pytest.raises(RuntimeError, match=f"ia3rt.patch.. took (the|its) adapters over: use .?{instead}"):
        use(wrapped)
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits(wrapped, IDS), before)
    assert (runtime.adapters, runtime.active_adapters) == (["b", "c", "d"], ["b"])
    runtime.unpatch()
    assert torch.equal(logits(wrapped, IDS), before)


@pytest.mark.parametrize("part", ["the PeftModel", "its tuner", "a model that transformers loaded adapters into"])
def test_what_other_code_set_on_the_object_refuses_too_and_comes_back(wrapped, part, tmp_path):
    """Unsloth sets a save_pretrained of its own, for example."""
    if part.startswith("a model"):
        patched = owner = tiny_model()
        owner.load_adapter(str(save_each(wrapped, tmp_path)[0]), "adapter_b")
    else:
        patched, owner = wrapped, wrapped if part == "the PeftModel" else wrapped.base_model
    own = vars(owner)["set_adapter"] = lambda name: None
    attributes = set(vars(owner))
    runtime = ia3rt.patch(patched)
    with pytest.raises(RuntimeError, match="out of use"):
        owner.set_adapter("c")
    runtime.unpatch()
    assert owner.set_adapter is own
    assert set(vars(owner)) == attributes | ({"peft_config"} if part == "its tuner" else set())


def test_what_it_runs_is_what_the_runtime_says(wrapped):
    mask = torch.ones_like(IDS)
    expected = {}
    for name in "cb":
        wrapped.set_adapter(name)
        expected[name] = logits(wrapped, IDS), generated(wrapped, IDS, mask, max_new_tokens=5)
    runtime = ia3rt.patch(wrapped)
    for name in "cb":
        runtime.set_adapter(name)
        assert torch.equal(logits(wrapped, IDS), expected[name][0])
        assert torch.equal(generated(wrapped, IDS, mask, max_new_tokens=5), expected[name][1])
    assert isinstance(wrapped, peft.PeftModelForCausalLM)
    assert type(wrapped).__name__ == "PeftModelForCausalLM"


def test_the_model_under_it_is_a_plain_one(wrapped, tmp_path):
    base = ia3rt.patch(wrapped).model
    assert not hasattr(base, "peft_config")
    assert list(base.state_dict()) == list(tiny_model().state_dict())
    base.save_pretrained(tmp_path)
    loaded = type(base).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, IDS), logits(tiny_model(), IDS))


OF_TRANSFORMERS = {
    "load_adapter": lambda model: model.load_adapter("folder", "e"),
    "add_adapter": lambda model: model.add_adapter(CONFIG, "e"),
    "set_adapter": lambda model: model.set_adapter("adapter_b"),
    "delete_adapter": lambda model: model.delete_adapter("adapter_b"),
    "enable_adapters": lambda model: model.enable_adapters(),
    "disable_adapters": lambda model: model.disable_adapters(),
    "active_adapters": lambda model: model.active_adapters(),
    "get_adapter_state_dict": lambda model: model.get_adapter_state_dict("adapter_b"),
    "save_pretrained": lambda model: model.save_pretrained("folder"),
    "push_to_hub": lambda model: model.push_to_hub("repository"),
}


@pytest.mark.parametrize("use", OF_TRANSFORMERS.values(), ids=OF_TRANSFORMERS)
def test_so_does_a_model_that_transformers_loaded_adapters_into(wrapped, use, tmp_path, monkeypatch):
    model = tiny_model()
    for folder in save_each(wrapped, tmp_path / "adapters"):
        model.load_adapter(str(folder), f"adapter_{folder.name}")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    ia3rt.patch(model)
    before = logits(model, IDS)
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM\..* is out of use.*: use rt\."):
        use(model)
    assert not list((tmp_path / "empty").iterdir())
    assert torch.equal(logits(model, IDS), before)


def test_what_is_set_on_such_a_model_meanwhile_stays(wrapped, tmp_path):
    model = tiny_model()
    model.load_adapter(str(save_each(wrapped, tmp_path)[0]), "first")
    runtime = ia3rt.patch(model)
    model.save_pretrained = mine = lambda path: path
    runtime.unpatch()
    assert model.save_pretrained is mine and "add_adapter" not in vars(model)


def test_a_model_without_adapters_keeps_what_transformers_offers(tmp_path):
    model = tiny_model()
    ia3rt.patch(model)
    model.save_pretrained(tmp_path)
    assert isinstance(model, nn.Module) and (tmp_path / "config.json").exists()


def test_a_peft_model_that_was_merged_for_good_goes_on_refusing(wrapped):
    wrapped.set_adapter("c")
    expected = logits(wrapped, IDS)
    merged = ia3rt.patch(wrapped).merge_and_unload()
    assert merged is wrapped.get_base_model()
    torch.testing.assert_close(logits(merged, IDS), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(wrapped, IDS), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="out of use"):
        wrapped.set_adapter("b")
    ia3rt.patch(merged)
