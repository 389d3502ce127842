"""An adapter says where it acts: no site by structure, another side, or more names than modules are no errors."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import IA3Config, get_peft_model
from tiny import logits, peft_model, peft_vectors, randomize, save_each, tiny_model, token_ids
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DebertaConfig,
    DebertaModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaModel,
)

import ia3rt

IDS = token_ids()
KINDS = {
    "bert": (BertConfig, BertModel),
    "roberta": (RobertaConfig, RobertaModel),
    "deberta": (DebertaConfig, DebertaModel),
}
DOWN = "model.layers.0.mlp.down_proj"


def encoder(kind):
    torch.manual_seed(0)
    config, model = KINDS[kind]
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
    return model(config(**sizes, pad_token_id=0)).eval()


def hidden(model):
    with torch.no_grad():
        return model(IDS).last_hidden_state


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("kind", KINDS)
def test_pefts_default_adapter_acts_at_more_than_the_sites_by_structure(kind, targets, tmp_path):
    """At the output of the attention too, as its names say."""
    wrapped = get_peft_model(encoder(kind), IA3Config(), "a").eval()
    randomize(wrapped, seed=1)
    wrapped.save_pretrained(tmp_path)
    model = encoder(kind)
    before = hidden(model)
    runtime = ia3rt.patch(model, target_modules=targets)
    brought = ("encoder.layer.0.attention.output.dense", "in")
    assert brought not in {site.key for site in runtime.sites}
    assert torch.equal(hidden(model), before)
    runtime.load_adapter(tmp_path / "a")
    assert brought in {site.key for site in runtime.sites}
    runtime.set_adapter("a")
    torch.testing.assert_close(hidden(model), hidden(wrapped), rtol=1e-5, atol=1e-6)
    with runtime.route(["a", None, "a"]):
        torch.testing.assert_close(hidden(model)[1], before[1], rtol=1e-5, atol=1e-6)
    runtime.unpatch()
    assert torch.equal(hidden(model), before)

    expected = hidden(wrapped)
    theirs = {key[0] for key in peft_vectors(wrapped, "a")}
    runtime = ia3rt.patch(wrapped, target_modules=targets)
    assert targets is not None or {site.path for site in runtime.sites} == theirs
    torch.testing.assert_close(hidden(wrapped), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(hidden(runtime.unpatch()), expected)


class Plain(nn.Module):
    """An MLP of which no table knows the names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

    def forward(self, x):
        return self.inner(x)


def test_a_model_without_sites_is_patched_all_the_same(tmp_path):
    model, x = Plain(), torch.randn(3, 8)
    before = model(x)
    runtime = ia3rt.patch(model)
    assert str(ia3rt.explain(model)).strip().startswith("0 sites")
    for use in (lambda: ia3rt.patch(model), lambda: runtime.add_adapter("a")):
        with pytest.raises(ValueError, match=r"patched already|'a' has no place to act: Plain has no site yet"):
            use()
    part = ia3rt.patch(model.inner, target_modules=["0"])
    with pytest.raises(ValueError, match="'inner.0' is patched already, as a part of the model"):
        runtime.add_adapter("a", {("inner.0", "out"): torch.rand(12)})
    assert (runtime.sites, runtime.adapters) == ([], [])
    part.unpatch()
    runtime.set_adapter(None)
    with pytest.raises(ValueError, match="all rows wear the base model"):
        runtime.merge_adapter()

    wrapped = get_peft_model(Plain(), IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]), "a")
    randomize(wrapped, seed=1)
    wrapped.save_pretrained(tmp_path)
    runtime.load_adapter(tmp_path / "a")
    runtime.set_adapter("a")
    assert {site.key for site in runtime.sites} == {("inner.0", "out"), ("inner.2", "in")}
    assert torch.equal(model(x), wrapped(x))
    runtime.unpatch()
    assert torch.equal(model(x), before)
    assert "ia3_runtime" not in vars(model)
    assert ia3rt.patch(nn.ReLU()).sites == []


def test_a_new_adapter_brings_the_sites_of_its_config():
    model, x = Plain(), torch.randn(3, 8)
    config = {"target_modules": ["0", "2"], "feedforward_modules": ["2"]}
    wrapped = get_peft_model(copy.deepcopy(model), IA3Config(**config), "a")
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a", config=config)
    assert {site.key for site in runtime.sites} == {("inner.0", "out"), ("inner.2", "in")}
    runtime.train_adapter("a")
    for one in (model, wrapped):
        optimizer = torch.optim.SGD([each for each in one.parameters() if each.requires_grad], 0.5)
        one(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(model(x), wrapped(x))
    with pytest.raises(ValueError, match="no IA³ site found in Plain with target_modules=.'absent'"):
        ia3rt.patch(Plain()).add_adapter("a", config={"target_modules": ["absent"]})


def test_complex_vectors_are_refused():
    runtime = ia3rt.patch(Plain())
    message = r"'a' at inner.0 .* is of dtype torch.complex64: expected a floating point one"
    with pytest.raises(ValueError, match=message):
        runtime.add_adapter("a", {("inner.0", "out"): torch.ones(12, dtype=torch.complex64)})
    assert (runtime.sites, runtime.adapters) == ([], [])


def test_named_modules_that_match_nothing_are_an_error():
    with pytest.raises(ValueError, match="no IA³ site found in BertModel with target_modules='nothing'"):
        ia3rt.patch(encoder("bert"), target_modules="nothing")


OUTSIDE = {
    "a list": (
        dict(target_modules=["v_proj"]),
        {(DOWN, "in"): 96},
        rf"patch\(target_modules=\['v_proj'\]\) leaves module '{DOWN}' out, and adapter 'x' has a vector for its input",
    ),
    "all-linear": (
        dict(target_modules="all-linear"),
        {("lm_head", "out"): 128},
        r"patch\(target_modules='all-linear'\) leaves module 'lm_head' out, and adapter 'x' has a vector",
    ),
    "a side": (
        dict(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
        {(DOWN, "out"): 64},
        rf"module '{DOWN}' wears its vector at the input by patch\(\)'s feedforward_modules, and adapter 'x'",
    ),
    "excluded": (
        dict(exclude_modules=["up_proj"]),
        {("model.layers.0.mlp.up_proj", "out"): 96},
        r"patch\(\) was told to exclude module 'model.layers.0.mlp.up_proj', and adapter 'x'",
    ),
}


@pytest.mark.parametrize(("arguments", "widths", "message"), OUTSIDE.values(), ids=OUTSIDE)
def test_a_module_that_the_user_left_out_is_named(arguments, widths, message):
    model = tiny_model()
    runtime = ia3rt.patch(model, **arguments)
    sites = runtime.sites
    with pytest.raises(ValueError, match=message):
        runtime.add_adapter("x", {key: torch.rand(width) for key, width in widths.items()})
    assert (runtime.adapters, runtime.sites) == ([], sites)
    assert torch.equal(logits(model, IDS), logits(tiny_model(), IDS))


def test_a_peft_model_with_a_module_left_out_stays_as_it_was():
    wrapped = peft_model(tiny_model(), "llama")
    before = logits(wrapped, IDS)
    with pytest.raises(ValueError, match=r"leaves module 'model.layers.0.self_attn.k_proj' out, and adapter 'b'"):
        ia3rt.patch(wrapped, target_modules=["v_proj", "down_proj"])
    assert torch.equal(logits(wrapped, IDS), before)
    wrapped.set_adapter("c")


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("name", ["attn.c_attn", "mlp.c_proj", "mlp.c_fc"])
def test_either_side_of_a_patched_conv1d(name, side, tmp_path):
    """transformers' Conv1D is known by its class, which patching changes."""
    wrapped = peft_model(
        tiny_model("gpt2"), "gpt2", "z", target_modules=[name], feedforward_modules=[name] if side == "in" else []
    )
    save_each(wrapped, tmp_path)
    model = tiny_model("gpt2")
    runtime = ia3rt.patch(model)
    usual = peft_model(tiny_model("gpt2"), "gpt2", "b")  # at the sites of the structure, which are patched already
    runtime.load_adapter(save_each(usual, tmp_path)[0])
    runtime.load_adapter(tmp_path / "z")
    runtime.set_adapter("z")
    torch.testing.assert_close(logits(model, IDS), logits(wrapped, IDS), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="'transformer.ln_f' is a LayerNorm, which wears no vector"):
        runtime.add_adapter("x", {("transformer.ln_f", "in"): torch.ones(64)})


class Twice(nn.Module):
    """One linear layer in two places."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.second(torch.relu(self.first(x))))


@pytest.mark.parametrize("targets", [["first"], ["first", "second"], ["last"]], ids=str)
def test_a_module_in_two_places_is_refused_where_a_vector_would_act_at_both(targets, tmp_path):
    wrapped = get_peft_model(Twice(), IA3Config(target_modules=targets, feedforward_modules=[]), "a")
    randomize(wrapped, seed=1)
    x = torch.randn(2, 8)
    before = wrapped(x)
    wrapped.save_pretrained(tmp_path)
    model = Twice()
    model.load_state_dict(_plain(wrapped))
    runtime = ia3rt.patch(model)
    if targets == ["last"]:
        runtime.load_adapter(tmp_path / "a")
        runtime.set_adapter("a")
        torch.testing.assert_close(model(x), before)
        ia3rt.patch(wrapped)
    else:
        for use in (lambda: ia3rt.patch(wrapped), lambda: runtime.load_adapter(tmp_path / "a")):
            with pytest.raises(
                ValueError, match=r"'a' has a vector at 'first', which is one module at \['first', 'sec"
            ):
                use()
    torch.testing.assert_close(wrapped(x), before)


def _plain(wrapped):
    state = wrapped.get_base_model().state_dict()
    return {key.replace("base_layer.", ""): value for key, value in state.items() if "ia3_l" not in key}


def test_an_error_names_a_modules_own_class():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2))
    runtime = ia3rt.patch(model)
    with pytest.raises(ValueError, match="'transformer.h.0.mlp' is a GPT2MLP, which wears no vector"):
        runtime.add_adapter("x", {("transformer.h.0.mlp", "in"): torch.ones(32)})


@pytest.mark.parametrize(
    ("targets", "feedforward"),
    [
        (r".*layers\.0\.mlp\.down_proj|.*k_proj", ["down_proj"]),
        (["k_proj", "down_proj"], r".*(down_proj|up_proj|norm)"),
        (r".*layers\.1\.(self_attn\.k_proj|mlp\.down_proj)", r".*\.mlp\..*"),
    ],
)
def test_feedforward_modules_may_match_more_where_peft_lets_them(targets, feedforward):
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward, task_type="CAUSAL_LM")
    wrapped = get_peft_model(tiny_model(), config)
    theirs = {
        (name, "in" if layer.is_feedforward else "out")
        for name, layer in wrapped.get_base_model().named_modules()
        if hasattr(layer, "ia3_l")
    }
    runtime = ia3rt.patch(tiny_model(), target_modules=targets, feedforward_modules=feedforward)
    assert {site.key for site in runtime.sites} == theirs


def test_names_have_to_be_among_the_targets_as_in_peft():
    names = dict(target_modules=["k_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(ValueError, match="subset"):
        peft.IA3Config(**names)
    with pytest.raises(ValueError, match=f"feedforward_modules matches '{DOWN}', which target_modules does not"):
        ia3rt.patch(tiny_model(), **names)
