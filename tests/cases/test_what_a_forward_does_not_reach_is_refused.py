"""Whether a forward reaches the layers that wear vectors is seen by what it does, and by what stands in its model.

The truth is the model itself, with the vectors multiplied into its weights.
"""

import weakref
from types import MethodType

import pytest
import torch
from mlps import IDS, make, patched, truths
from tiny import logits
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

import ia3rt

PATH = "model.layers.1.mlp.down_proj"


def worn(model=None):
    runtime = patched(model or make("llama"))
    runtime.set_adapter("b")
    return runtime


def another_mlp(model):
    model.model.layers[1].mlp = LlamaMLP(model.config)


def another_block(model):
    model.model.layers[1] = LlamaDecoderLayer(model.config, 1)


def other_blocks(model):
    model.model.layers = nn.ModuleList([model.model.layers[0], LlamaDecoderLayer(model.config, 1)])


@pytest.mark.parametrize("call", [lambda model: model, lambda model: model.model], ids=["the model", "a model in it"])
@pytest.mark.parametrize("replace", [another_mlp, another_block, other_blocks])
def test_another_module_in_the_place_of_one_around_a_layer(replace, call):
    model = worn().model
    call(model)(IDS)
    blocks, mlp = model.model.layers, model.model.layers[1].mlp
    block = blocks[1]
    replace(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"was put in the place of 'model\.layers\.1.*' after patch"):
            call(model)(IDS)
    model.model.layers = blocks
    blocks[1], block.mlp = block, mlp
    call(model)(IDS)


def test_a_compiled_model_sees_it_too():
    model = worn().model
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    logits(compiled, IDS)
    another_mlp(model)
    with pytest.raises(Exception, match="a LlamaMLP was put in the place of 'model.layers.1.mlp'"):
        logits(compiled, IDS)
    torch._dynamo.reset()


class Fusing(nn.Module):
    """As diffusers' attention: it can make one matrix of several, and calls that from then on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8, bias=False) for _ in "qkv")
        self.is_fused = False

    def fuse(self) -> None:
        self.to_qkv = nn.Linear(8, 24, bias=False)
        self.to_qkv.weight.data = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])
        self.is_fused = True

    def forward(self, x):
        q, k, v = self.to_qkv(x).chunk(3, -1) if self.is_fused else (self.to_q(x), self.to_k(x), self.to_v(x))
        return q * k + v


@pytest.mark.parametrize("when", ["before patch", "before a forward", "after a forward"])
@pytest.mark.parametrize("compiles", [False, True])
def test_a_layer_that_others_weights_were_copied_into(when, compiles):
    model, x = nn.Sequential(Fusing()), torch.randn(3, 8)
    if when == "before patch":
        model[0].fuse()
    runtime = ia3rt.patch(model, target_modules=["to_k", "to_v"], feedforward_modules=[])
    runtime.add_adapter("a", {site.key: torch.full((8,), 3.0) for site in runtime.sites})
    runtime.set_adapter("a")
    torch._dynamo.reset()
    call = torch.compile(model, backend="eager") if compiles else model
    if when == "after a forward":
        right = model[0].to_q(x) * nn.functional.linear(x, 3 * model[0].to_k.weight)
        right += nn.functional.linear(x, 3 * model[0].to_v.weight)
        torch.testing.assert_close(call(x), right)
    if when != "before patch":
        model[0].fuse()
    for _ in range(2):
        with pytest.raises(Exception, match=r"weight of '0\.to_k' is a part of that of '0\.to_qkv' too"):
            call(x)
    model[0].is_fused = False
    del model[0].to_qkv
    call(x)
    torch._dynamo.reset()


def a_wrapper(model):
    model.model.layers[1].mlp = nn.Sequential(model.model.layers[1].mlp)


def another_order(model):
    first, second = model.model.layers
    model.model.layers = nn.ModuleList([second, first])


def none_in_its_place(model):
    """As layers are dropped."""

    class Through(nn.Module):
        def forward(self, x, **_):
            return x

    model.model.layers[1] = Through()


@pytest.mark.parametrize("change", [a_wrapper, another_order, none_in_its_place])
def test_layers_that_stand_elsewhere_or_nowhere_are_no_error(change):
    runtime = worn()
    truth = truths(runtime, make("llama"))["b"]
    for model in (runtime.model, truth):
        change(model)
        model.config.use_cache = False
    torch.testing.assert_close(logits(runtime.model, IDS).double(), logits(truth, IDS), rtol=1e-4, atol=1e-5)


def weight_and_bias(layer):
    return layer.weight, layer.bias


def by_a_helper(self, x):
    """As unsloth reads it."""
    return F.linear(F.silu(self.gate_proj(x)) * self.up_proj(x), *weight_and_bias(self.down_proj))


def by_another_name(self, x):
    down = self.down_proj
    return F.linear(F.silu(self.gate_proj(x)) * self.up_proj(x), down.weight)


def by_its_block(self, hidden_states, **kwargs):
    x = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
    mlp, h = self.mlp, self.post_attention_layernorm(x)
    return x + F.linear(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h), mlp.down_proj.weight)


def in_evaluation(self, x):
    h = F.silu(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(h) if self.training else by_another_name(self, x)


def on(forward):
    def change(model):
        block = model.model.layers[1]
        around = block if forward is by_its_block else block.mlp
        around.forward = MethodType(forward, around)

    return change


@pytest.mark.parametrize("when", ["before patch", "after patch", "after a forward"])
@pytest.mark.parametrize("forward", [by_a_helper, by_another_name, by_its_block, in_evaluation])
def test_a_weight_that_is_read_past_its_layer(forward, when):
    model = make("llama")
    if when == "before patch":
        on(forward)(model)
    runtime = worn(model)
    if when == "after a forward":
        logits(model, IDS)
    if when != "before patch":
        on(forward)(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"reads the weight of '{PATH}' and never calls it"):
            logits(model, IDS)
    if forward is in_evaluation:
        runtime.model.train()
        logits(model, IDS)


def test_a_forward_of_the_mlps_class_that_reads(monkeypatch):
    model = worn().model
    logits(model, IDS)
    monkeypatch.setattr(LlamaMLP, "forward", by_another_name)
    with pytest.raises(ValueError, match=r"by_another_name of LlamaMLP .* reads the weight"):
        logits(model, IDS)


def test_a_class_that_was_seen_is_looked_at_again_once_its_forward_is_another(monkeypatch):
    assert len(ia3rt.patch(make("llama")).sites) == 6

    def forward(self, x):
        return F.linear(F.silu(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    assert len(ia3rt.patch(make("llama")).sites) == 4


KEPT = {}


def by_its_class(layer):
    layer.forward = lambda x: type(layer).forward(layer, x)


def in_a_dict(layer):
    KEPT[layer] = layer.forward
    layer.forward = lambda x: KEPT[layer](x)


def by_a_name_in_a_string(layer):
    name, layer.before = "before", layer.forward
    layer.forward = lambda x: getattr(layer, name)(x)


def weakly(layer):
    before = weakref.WeakMethod(layer.forward)
    layer.forward = lambda x: before()(x)


def in_a_slot(layer):
    class Calls:
        __slots__ = ("before",)

        def __init__(self, before):
            self.before = before

        def __call__(self, x):
            return self.before(x)

    layer.forward = Calls(layer.forward)


@pytest.mark.parametrize("change", [by_its_class, in_a_dict, by_a_name_in_a_string, weakly, in_a_slot])
def test_a_forward_that_leads_on_however_it_does(change):
    runtime = worn()
    truth = truths(runtime, make("llama"))["b"]
    change(runtime.model.get_submodule(PATH))
    torch.testing.assert_close(logits(runtime.model, IDS).double(), logits(truth, IDS), rtol=1e-4, atol=1e-5)


def test_a_callable_that_keeps_the_forward_to_put_it_back():
    model = worn().model
    layer = model.get_submodule(PATH)

    class Computes:
        def __init__(self):
            self.before, self.weight = layer.forward, layer.weight

        def restore(self):
            layer.forward = self.before

        def __call__(self, x):
            return F.linear(x, self.weight)

    layer.forward = Computes()
    with pytest.raises(ValueError, match=f"'{PATH}' has a forward of its own"):
        logits(model, IDS)
    layer.forward.restore()
    logits(model, IDS)


def test_a_layer_that_is_not_called_or_only_looked_at_is_no_error():
    class Experts(nn.Module):
        main_input_name = "x"

        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return self.experts[0](x.to(self.experts[1].weight.dtype))

    model = Experts()
    runtime = ia3rt.patch(model, target_modules="all-linear")
    x, vectors = torch.randn(2, 8), {site.key: torch.rand(8) for site in runtime.sites}
    expected = model(x) * vectors["experts.0", "out"]
    runtime.add_adapter("a", vectors)
    runtime.set_adapter("a")
    torch.testing.assert_close(model(x), expected)
