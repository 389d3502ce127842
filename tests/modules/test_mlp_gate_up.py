"""With fuse_gate_up, an MLP's first matrices and its activation are one launch, wherever nothing is skipped by it."""

import pytest
import torch
from mlps import IDS, check, make
from tiny import FAMILIES, logits, peft_model, save_each, tiny_model
from torch import nn
from where import DEVICE, home

import ia3rt
from ia3rt import ops
from ia3rt.modules import mlp as mlp_module


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    """How many rows each launch of gate_up had."""
    counted: list[int] = []
    run = ops.gate_up

    def count(x, *rest):
        counted.append(x.numel() // x.shape[-1])
        return run(x, *rest)

    monkeypatch.setattr(mlp_module.ops, "gate_up", count)
    return counted


def fused(model: nn.Module, **options) -> ia3rt.Runtime:
    runtime = ia3rt.patch(model.to(DEVICE), backend="triton", fuse_gate_up=True, **options)
    generator = torch.Generator().manual_seed(1)
    for name in "bc":
        vectors = {site.key: torch.empty(site.width).uniform_(-0.5, 2, generator=generator) for site in runtime.sites}
        runtime.add_adapter(name, vectors)
    return runtime


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_families(name, launches) -> None:
    """Apart weights with biases, halves of one, and a Conv1D that is not gated."""
    runtime = fused(make(name))
    check(runtime, make(name))
    assert launches == 6 * [IDS.numel()]  # two layers; two adapters, and a mix a row


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_peft(family, launches, tmp_path) -> None:
    model = tiny_model(family)
    wrapped = peft_model(model, family, "bc")
    folders = save_each(wrapped, tmp_path)
    runtime = ia3rt.patch(model.to(DEVICE), backend="triton", fuse_gate_up=True)
    for folder in folders:
        name = runtime.load_adapter(folder)
        runtime.set_adapter(name)
        wrapped.set_adapter(name)
        torch.testing.assert_close(logits(model, IDS), logits(wrapped, IDS), rtol=1e-4, atol=1e-5)
    assert len(launches) == 4


def test_phi3_equals_peft(launches, tmp_path) -> None:
    model = make("phi3")
    names = {"target_modules": ["qkv_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    wrapped = peft_model(model, "llama", "b", **names)
    (folder,) = save_each(wrapped, tmp_path)
    runtime = ia3rt.patch(model.to(DEVICE), backend="triton", fuse_gate_up=True)
    runtime.set_adapter(runtime.load_adapter(folder, "b"))
    torch.testing.assert_close(logits(model, IDS), logits(wrapped, IDS), rtol=1e-4, atol=1e-5)
    assert len(launches) == 2


def test_only_where_it_is_asked_for(launches) -> None:
    for options in ({"backend": "triton"}, {"backend": "torch", "fuse_gate_up": True}):
        logits(ia3rt.patch(make("llama").to(home(options["backend"])), **options).model, IDS)
    assert not launches


def test_an_activation_that_the_kernel_does_not_know_is_left_to_torch(launches) -> None:
    check(fused(make("llama", hidden_act="mish")), make("llama", hidden_act="mish"))
    assert not launches


@pytest.mark.parametrize(
    ("name", "layer", "side", "width"),
    [("llama", "gate_proj", "out", 48), ("llama", "up_proj", "in", 32), ("phi3", "gate_up_proj", "out", 96)],
)
@pytest.mark.slow
def test_a_vector_at_a_first_matrix_turns_it_off_for_that_mlp(name, layer, side, width, launches) -> None:
    runtime = fused(make(name))
    logits(runtime.model, IDS)
    runtime.add_adapter("d", {(f"model.layers.1.mlp.{layer}", side): torch.rand(width)})
    launches.clear()
    check(runtime, make(name))
    assert launches == 4 * [IDS.numel()]  # of layer 0 alone; one adapter more


@pytest.mark.parametrize(
    "register",
    [
        lambda layer, hook: layer.register_forward_hook(lambda *_: hook()),
        lambda layer, hook: layer.register_forward_pre_hook(lambda *_: hook()),
        lambda layer, hook: nn.modules.module.register_module_forward_hook(
            lambda module, *_: hook() if module is layer else None
        ),
    ],
)
def test_hooks_are_noticed_when_they_come_and_when_they_go(register, launches) -> None:
    model = fused(make("llama")).model
    called: list[int] = []
    expected = logits(model, IDS)
    launches.clear()
    handle = register(model.model.layers[0].mlp.gate_proj, lambda: called.append(1))
    torch.testing.assert_close(logits(model, IDS), expected)
    assert called and len(launches) < 2
    handle.remove()
    launches.clear()
    assert torch.equal(logits(model, IDS), expected)
    assert len(launches) == 2 and len(called) == 1


def test_a_forward_of_its_own_is_called(launches) -> None:
    model = fused(make("llama")).model
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)
    fresh = make("llama")
    fresh.model.layers[0].mlp.up_proj.weight.data *= 2
    fresh.model.layers[0].mlp.up_proj.bias.data *= 2
    torch.testing.assert_close(logits(model, IDS), logits(fresh, IDS), rtol=1e-4, atol=1e-5)
    assert len(launches) == 1


def test_an_exchanged_layer_or_dtype_is_left_to_the_modules(launches) -> None:
    class Quantised(nn.Linear):
        def forward(self, input):
            return super().forward(input)

    model = fused(make("llama")).model
    model.model.layers[0].mlp.gate_proj.__class__ = Quantised
    logits(model, IDS)
    assert len(launches) == 1
    mlp = model.model.layers[1].mlp
    with pytest.raises(RuntimeError, match="dtype"):  # as of the modules themselves
        mlp(torch.ones(1, 32, dtype=torch.bfloat16, device=DEVICE))


def test_unpatch_restores_the_model() -> None:
    model = make("llama")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    runtime = fused(model)
    logits(model, IDS)
    runtime.unpatch()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert torch.equal(logits(model, IDS), logits(make("llama").to(DEVICE), IDS))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_those_of_an_unfused_model(name, launches) -> None:
    """Of all weights and of the vectors in training."""
    gradients = []
    for fuse in (True, False):
        model, ids = make(name).to(DEVICE), IDS.to(DEVICE)
        runtime = ia3rt.patch(model, backend="triton", fuse_gate_up=fuse)
        runtime.add_adapter("b")
        runtime.train_adapter("b")
        model.requires_grad_(True)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(launches) == 2
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_torch_compile_has_one_graph(launches) -> None:
    runtime = fused(make("llama"))
    runtime.set_adapter("b")
    mlp, x = runtime.model.model.layers[0].mlp, torch.randn(3, 32).to(DEVICE)
    with torch.no_grad():
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, mlp(x))
