"""The short way to a linear layer is taken only where nothing hangs on the layer, and gives what the long way does."""

import pytest
import torch
from tiny import token_ids
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from transformers import LlamaConfig, LlamaForCausalLM

import ia3rt
from ia3rt.modules import bare

IDS = token_ids()
SIZES = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
MLP = "model.layers.1.mlp"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def test_it_is_the_layers_result() -> None:
    layer, x = nn.Linear(5, 3).double(), torch.randn(2, 5, dtype=torch.float64)
    y, ours = bare.linear(layer, x)
    assert ours
    torch.testing.assert_close(y, x @ layer.weight.T + layer.bias, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "change", ["forward", "hook", "pre_hook", "pruned", "spectral_norm", "global_hook", "subclass"]
)
def test_what_hangs_on_a_layer_is_run(change) -> None:
    torch.manual_seed(0)
    layer, x, handle = nn.Linear(5, 3), torch.randn(2, 5), None
    if change == "forward":
        layer.forward = lambda x: x[:, :3] * 2
    elif change == "hook":
        layer.register_forward_hook(lambda module, args, y: y + 1)
    elif change == "pre_hook":
        layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    elif change == "pruned":
        prune.l1_unstructured(layer, "weight", amount=0.5)
    elif change == "spectral_norm":
        parametrizations.spectral_norm(layer)
        layer.eval()
    elif change == "subclass":
        layer.__class__ = type("Doubling", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})
    else:
        handle = register_module_forward_hook(lambda module, args, y: y + 1)
    try:
        y, ours = bare.linear(layer, x)
        assert not ours and torch.equal(y, layer(x))
    finally:
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "act_fn", "down_proj"])
def test_a_hook_sees_what_it_sees_on_the_unadapted_model(model, name) -> None:
    # Wearing the vector changes what the second layer's MLP gets from the first, so only that layer is adapted.
    seen = []
    model.get_submodule(f"{MLP}.{name}").register_forward_hook(lambda module, args, y: seen.append(y))
    with torch.no_grad():
        model(IDS)
        kept = seen[0].clone()
        runtime = ia3rt.patch(model)
        vector = 1 + torch.rand(48)
        runtime.add_adapter("a", {(f"{MLP}.down_proj", "in"): vector})
        runtime.set_adapter("a")
        model(IDS)
    # What the hook was given must not be overwritten afterwards: the MLP multiplies in place where it may.
    if name == "down_proj":
        assert not torch.allclose(seen[1], kept)
    else:
        torch.testing.assert_close(seen[1], kept, rtol=1e-6, atol=1e-7)


def test_hooks_do_not_change_the_logits(model) -> None:
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a", _vectors(model))
    runtime.set_adapter("a")
    with torch.no_grad():
        bare_logits = model(IDS).logits
        for module in model.modules():
            module.register_forward_hook(lambda module, args, y: None)
        assert torch.equal(model(IDS).logits, bare_logits)


def _vectors(model):
    return {(path, "in"): 1 + torch.rand(48) for path, _ in model.named_modules() if path.endswith("down_proj")}
