"""A layer wears its vector by whatever way it is reached, also by what other code put around it after patch().

The truth is the model itself, with the vectors multiplied into its weights and the same code put around it.
"""

import functools
from types import MethodType

import accelerate
import pytest
import torch
from mlps import IDS, make, patched, truths
from tiny import logits
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import ia3rt
from ia3rt.modules.layer import IA3Layer

MIXED = ["b", None, "c"]


def swiglu(self, x):
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def mlps(model):
    return [layer.mlp for layer in model.model.layers]


def bound_forward(model):
    for mlp in mlps(model):
        mlp.forward = MethodType(swiglu, mlp)


def partial_forward(model):
    for mlp in mlps(model):
        mlp.forward = functools.partial(swiglu, mlp)


def plain_forward(model):
    for mlp in mlps(model):
        mlp.forward = lambda x, mlp=mlp: 2 * swiglu(mlp, x)


def forward_in_its_dict(model):
    """As Liger sets it."""
    for mlp in mlps(model):
        vars(mlp)["forward"] = swiglu.__get__(mlp, type(mlp))


def wrapped_forward(model):
    """As a profiler does it."""
    for mlp in mlps(model):
        before = mlp.forward
        mlp.forward = functools.wraps(before)(lambda x, before=before: before(x) + 1)


def subclass_of_the_mlp(model):
    for mlp in mlps(model):
        mlp.__class__ = type("Other", (type(mlp),), {"forward": lambda self, x: self.down_proj(self.up_proj(x).sin())})


def forward_of_the_mlps_class(model):
    """Which pytest's monkeypatch takes back: see `changed`."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    LlamaMLP.forward = lambda self, x: self.down_proj(self.act_fn(self.up_proj(x)) + self.gate_proj(x))


def accelerate_hooks(model):
    for module in model.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())


def accelerate_hooks_on_the_layers(model):
    for mlp in mlps(model):
        accelerate.hooks.add_hook_to_module(mlp.down_proj, accelerate.hooks.ModelHook())


def hook_on_the_layer(model):
    for mlp in mlps(model):
        mlp.down_proj.register_forward_hook(lambda module, args, y: y + 1)


def pre_hook_on_the_layer(model):
    for mlp in mlps(model):
        mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def hook_on_the_activation(model):
    for mlp in mlps(model):
        mlp.act_fn.register_forward_hook(lambda module, args, y: y + 1)


def forward_of_the_activation(model):
    for mlp in mlps(model):
        mlp.act_fn.forward = lambda x: x.cos()


def another_activation(model):
    for mlp in mlps(model):
        mlp.act_fn = nn.Tanh()


def another_activation_of_a_known_name(model):
    class SiLU(nn.Module):
        def forward(self, x):
            return x.sin()

    for mlp in mlps(model):
        mlp.act_fn = SiLU()


def activation_that_is_no_module(model):
    for mlp in mlps(model):
        del mlp.act_fn
        mlp.act_fn = torch.cos


def forward_of_the_layer_that_calls_on(model):
    for mlp in mlps(model):
        mlp.down_proj.forward = functools.wraps(mlp.down_proj.forward)(
            lambda x, before=mlp.down_proj.forward: before(x) + 1
        )


def forward_of_the_layer_that_calls_an_attribute(model):
    def forward(self, x):
        return 3 * self.before(x)

    for mlp in mlps(model):
        mlp.down_proj.before = mlp.down_proj.forward
        mlp.down_proj.forward = MethodType(forward, mlp.down_proj)


def callable_that_calls_on(model):
    class Twice:
        def __init__(self, before):
            self.before = before

        def __call__(self, x):
            return self.before(x) * 2

    for mlp in mlps(model):
        mlp.down_proj.forward = Twice(mlp.down_proj.forward)


def class_of_the_layer(model):
    for mlp in mlps(model):
        cls = type(mlp.down_proj)
        forward = lambda self, x, cls=cls: cls.forward(self, x) * 2  # noqa: E731
        mlp.down_proj.__class__ = type("Twice", (cls,), {"forward": forward})


def parametrized_layer(model):
    for mlp in mlps(model):
        with torch.no_grad():
            parametrizations.weight_norm(mlp.down_proj)
        mlp.down_proj.parametrizations.weight.original0.data *= 2


def pruned_layer(model):
    for mlp in mlps(model):
        mask = torch.arange(mlp.down_proj.weight.shape[1], device=mlp.down_proj.weight.device) % 3 > 0
        prune.custom_from_mask(mlp.down_proj, "weight", mask.expand_as(mlp.down_proj.weight))
        mlp.down_proj.weight_orig.data *= 2  # which the next forward makes a weight of


def pruned_value_projection(model):
    for layer in model.model.layers:
        weight = layer.self_attn.v_proj.weight
        prune.custom_from_mask(layer.self_attn.v_proj, "weight", torch.ones_like(weight))
        layer.self_attn.v_proj.weight_orig.data *= 2


def wrapper_around_the_layer(model):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * 2

    for mlp in mlps(model):
        mlp.down_proj = Wrapper(mlp.down_proj)


CHANGES = [
    bound_forward,
    partial_forward,
    plain_forward,
    forward_in_its_dict,
    wrapped_forward,
    subclass_of_the_mlp,
    forward_of_the_mlps_class,
    accelerate_hooks,
    accelerate_hooks_on_the_layers,
    hook_on_the_layer,
    pre_hook_on_the_layer,
    hook_on_the_activation,
    forward_of_the_activation,
    another_activation,
    another_activation_of_a_known_name,
    activation_that_is_no_module,
    forward_of_the_layer_that_calls_on,
    forward_of_the_layer_that_calls_an_attribute,
    callable_that_calls_on,
    class_of_the_layer,
    parametrized_layer,
    pruned_layer,
    pruned_value_projection,
    wrapper_around_the_layer,
]


def one_layer():
    """As many as it takes: in Triton's interpreter each costs a second."""
    model = make("llama")
    del model.model.layers[1:]
    return model


@pytest.fixture
def changed(request, monkeypatch):
    """What other code does to a model."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(LlamaMLP, "forward", LlamaMLP.forward)  # as it is, and put back at the end
    return request.param


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("changed", CHANGES, indirect=True, ids=lambda change: change.__name__)
def test_what_other_code_puts_around_a_layer_after_patch(changed, backend):
    runtime = patched(one_layer(), backend)
    runtime.set_adapter("b")
    logits(runtime.model, IDS)  # so that what is prepared by a first forward is there
    exact = truths(runtime, one_layer())
    exact[None] = one_layer().double()
    changed(runtime.model)
    for truth in exact.values():
        changed(truth)
    for name in "bc":
        runtime.set_adapter(name)
        torch.testing.assert_close(logits(runtime.model, IDS).double(), logits(exact[name], IDS), rtol=1e-4, atol=1e-4)
    with runtime.route(MIXED):
        mixed = logits(runtime.model, IDS).double()
    for row, name in enumerate(MIXED):
        torch.testing.assert_close(mixed[row], logits(exact[name], IDS)[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "changed", [bound_forward, hook_on_the_layer, accelerate_hooks, another_activation], indirect=True
)
def test_its_gradient_is_that_of_the_scaled_weights(changed, backend):
    """By the chain rule: of W ∘ l, the gradient of l is that of the product, times W, summed along the other side."""
    runtime, fresh = patched(make("llama"), backend), make("llama").double()
    truth = truths(runtime, make("llama"))["b"]
    for each in (runtime.model, truth):
        changed(each)
    parameters = runtime.train_adapter("b")
    for model in (runtime.model, truth):
        model(IDS.to(model.device)).logits.square().mean().backward()
    for site, parameter in zip(runtime.sites, parameters, strict=True):
        layer, plain = truth.get_submodule(site.path), fresh.get_submodule(site.path)
        expected = (layer.weight.grad * plain.weight).sum(0 if site.side == "in" else 1)
        if site.side == "out" and plain.bias is not None:
            expected += layer.bias.grad * plain.bias
        torch.testing.assert_close(parameter.grad.double().cpu(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_one_layer_alone(family, backend):
    runtime = patched(make(family), backend)
    truth = truths(runtime, make(family))["b"]
    runtime.set_adapter("b")
    for site in runtime.sites:
        layer = runtime.model.get_submodule(site.path)
        width = truth.get_submodule(site.path).weight.shape[0 if family == "gpt2" else 1]
        x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            expected = truth.get_submodule(site.path)(x.double())
            there = x.to(runtime.model.device)
            by_name = layer(**{"x" if family == "gpt2" else "input": there})
            for y in (layer(there), layer.forward(there), by_name):
                torch.testing.assert_close(y.double().cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_mlp_may_be_called_by_name(backend):
    runtime = patched(make("gpt2"), backend)
    truth = truths(runtime, make("gpt2"))["b"]
    runtime.set_adapter("b")
    x = torch.randn(1, 3, 32)
    with torch.no_grad():
        y = runtime.model.transformer.h[0].mlp(hidden_states=x.to(runtime.model.device))
        torch.testing.assert_close(y.double().cpu(), truth.transformer.h[0].mlp(x.double()), rtol=1e-4, atol=1e-5)


def test_hooks_on_the_layer_see_the_unscaled_input_and_the_scaled_output():
    runtime = patched(make("llama"))
    fresh, vectors = make("llama"), {}
    for site, vector in runtime._bank.vectors(runtime._bank.adapters["b"]).items():
        vectors[site.path] = vector
    path, seen, model = "model.layers.0.mlp.down_proj", [], runtime.model
    runtime.add_adapter("here", {path: vectors[path]})
    runtime.set_adapter("here")
    for each in (fresh, model):
        each.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        each.get_submodule(path).register_forward_hook(lambda module, args, y: seen.append(y.clone()))
        logits(each, IDS)
    layer = fresh.get_submodule(path)
    torch.testing.assert_close(seen[2], seen[0])
    torch.testing.assert_close(
        seen[3], F.linear(seen[0] * vectors[path], layer.weight, layer.bias), rtol=1e-4, atol=1e-5
    )


def test_the_short_way_is_taken_where_nothing_stands_in_between(monkeypatch):
    """By the layers that are asked to scale their input: none, and each with something on it."""
    runtime, asked = patched(make("llama")), []
    forward = IA3Layer.ia3_forward

    def count(self, routing, l_in, *rest):
        asked.append(l_in is not None)
        return forward(self, routing, l_in, *rest)

    monkeypatch.setattr(IA3Layer, "ia3_forward", count)
    runtime.set_adapter("b")
    for changes, expected in ((0, 0), (1, 1), (2, 2)):
        for mlp in mlps(runtime.model)[:changes]:
            mlp.down_proj.register_forward_hook(lambda *_: None)
        asked.clear()
        logits(runtime.model, IDS)
        assert sum(asked) == expected and len(asked) == 6


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_explain_says_who_applies_a_vector_now(backend):
    runtime = patched(make("llama"), backend)
    short = {"torch": "what the activation gives", "triton": "the vector costs no pass"}[backend]

    def whys():
        return [entry.why for entry in ia3rt.explain(runtime.model).sites if entry.site.side == "in"]

    assert all(short in why for why in whys())
    first, second = mlps(runtime.model)
    handle = first.down_proj.register_forward_hook(lambda *_: None)
    assert [short in why for why in whys()] == [False, True]
    handle.remove()
    second.forward = MethodType(swiglu, second)
    assert [short in why for why in whys()] == [True, False]


@pytest.mark.parametrize("changed", [bound_forward, hook_on_the_layer, parametrized_layer], indirect=True)
def test_unpatch_gives_the_model_back_with_what_was_put_on_it(changed):
    model, fresh = make("llama"), make("llama")
    runtime = patched(model)
    runtime.set_adapter("b")
    for each in (model, fresh):
        changed(each)
    runtime.unpatch()
    assert torch.equal(logits(model, IDS), logits(fresh, IDS))
    assert not any(isinstance(module, IA3Layer) for module in model.modules())
    if changed is parametrized_layer:
        for mlp in mlps(model):
            nn.utils.parametrize.remove_parametrizations(mlp.down_proj, "weight")
            assert type(mlp.down_proj) is nn.Linear


def test_a_forward_under_accelerates_hook_that_is_not_the_class_s_is_not_lost():
    model, fresh = make("llama"), make("llama")
    for each in (model, fresh):
        for mlp in mlps(each):
            mlp.forward = lambda x, mlp=mlp: mlp.down_proj(mlp.up_proj(x).sin())
            accelerate.hooks.add_hook_to_module(mlp, accelerate.hooks.ModelHook())
    runtime = patched(model)
    truth = truths(runtime, make("llama"))["b"]
    for mlp in mlps(truth):
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(mlp.up_proj(x).sin())
    runtime.set_adapter("b")
    torch.testing.assert_close(logits(model, IDS).double(), logits(truth, IDS), rtol=1e-4, atol=1e-5)
    runtime.unpatch()
    assert torch.equal(logits(model, IDS), logits(fresh, IDS))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_fused_projection_with_a_hook_or_called_alone(backend):
    runtime = patched(make("phi3"), backend)
    exact = truths(runtime, make("phi3"))["b"]
    runtime.set_adapter("b")
    logits(runtime.model, IDS)

    def change(model):
        for layer in model.model.layers:
            layer.self_attn.qkv_proj.register_forward_hook(lambda module, args, y: y + 1)

    for each in (runtime.model, exact):
        change(each)
    torch.testing.assert_close(logits(runtime.model, IDS).double(), logits(exact, IDS), rtol=1e-4, atol=1e-4)


def test_another_rotary_embedding_after_patch_is_called(monkeypatch):
    """As Liger exchanges it in transformers' module."""
    from transformers.models.phi3 import modeling_phi3

    runtime = patched(make("phi3"), "triton")
    exact = truths(runtime, make("phi3"))["b"]
    runtime.set_adapter("b")
    theirs = modeling_phi3.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_phi3, "apply_rotary_pos_emb", lambda q, k, cos, sin: theirs(q, k, -cos, sin))
    torch.testing.assert_close(logits(runtime.model, IDS).double(), logits(exact, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changed", [bound_forward, hook_on_the_layer, another_activation], indirect=True)
def test_under_torch_compile(changed):
    runtime = patched(make("llama"))
    exact = truths(runtime, make("llama"))["b"]
    for each in (runtime.model, exact):
        changed(each)
    torch._dynamo.reset()
    compiled = torch.compile(runtime.model, backend="eager", fullgraph=True)
    runtime.set_adapter("b")
    torch.testing.assert_close(logits(compiled, IDS).double(), logits(exact, IDS), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
