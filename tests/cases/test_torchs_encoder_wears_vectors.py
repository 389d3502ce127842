"""nn.TransformerEncoderLayer, whose fast path reads all weights at once: without gradients, and with nested tensors."""

import copy

import pytest
import torch
from torch import nn
from where import home

import ia3rt

ROWS = ["a", None, "b"]


def encoder(layers=2, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=not options).eval()


def patched(model, backend):
    names = ["linear1", "linear2"]
    runtime = ia3rt.patch(
        model.to(home(backend)), target_modules=names, feedforward_modules=["linear2"], backend=backend
    )
    generator = torch.Generator().manual_seed(1)
    for name in "ab":
        vectors = {site.path: torch.empty(site.width).uniform_(-0.5, 2, generator=generator) for site in runtime.sites}
        runtime.add_adapter(name, vectors)
    return runtime


def truth(model, runtime, name):
    """The vectors in the weights: of linear1 at its output, of linear2 at its input."""
    scaled = copy.deepcopy(model)
    adapter = runtime._bank.adapters[name]
    for site, vector in runtime._bank.vectors(adapter).items():
        layer, vector = scaled.get_submodule(site.path), vector.cpu()
        with torch.no_grad():
            layer.weight.mul_(vector if site.side == "in" else vector[:, None])
            if site.side == "out":
                layer.bias.mul_(vector)
    return scaled


def given(padded):
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(3, 5, dtype=torch.bool)
    if padded:
        mask[1, 3:] = mask[2, 4:] = True
    return x, mask if padded else None


def run(model, x, mask):
    device = next(model.parameters()).device
    with torch.no_grad():
        return model(x.to(device), src_key_padding_mask=None if mask is None else mask.to(device)).cpu()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}], ids=str)
def test_all_rows_and_each_row(options, padded, backend):
    model, (x, mask) = encoder(**options), given(padded)
    runtime = patched(copy.deepcopy(model), backend)
    rows = {name: run(truth(model, runtime, name), x, mask) for name in "ab"} | {None: run(model, x, mask)}
    for name, expected in rows.items():
        runtime.set_adapter(name)
        torch.testing.assert_close(run(runtime.model, x, mask), expected, rtol=1e-4, atol=1e-5)
    with runtime.route(ROWS):
        routed = run(runtime.model, x, mask)
    for row, name in enumerate(ROWS):
        torch.testing.assert_close(routed[row], rows[name][row], rtol=1e-4, atol=1e-5)


def test_an_adapter_that_brings_such_a_site():
    model, (x, mask) = (
        nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4), "encoder": encoder()}),
        given(padded=True),
    )
    runtime = ia3rt.patch(model)
    plain = copy.deepcopy(model["encoder"].layers[1].linear2)
    vector = torch.rand(24)
    runtime.add_adapter("c", {("encoder.layers.1.linear2", "in"): vector})
    runtime.set_adapter("c")
    expected = encoder()
    with torch.no_grad():
        expected.layers[1].linear2.weight.copy_(plain.weight * vector)
    torch.testing.assert_close(run(model["encoder"], x, mask), run(expected, x, mask), rtol=1e-4, atol=1e-5)


def test_unpatch_gives_the_fast_path_back(monkeypatch):
    model, (x, mask) = encoder(), given(padded=True)
    calls, fast = [], torch._transformer_encoder_layer_fwd

    def count(*args):
        calls.append(1)
        return fast(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", count)
    expected = run(model, x, mask)
    assert len(calls) == 2
    runtime = patched(model, "torch")
    run(model, x, mask)
    assert len(calls) == 2
    runtime.unpatch()
    assert torch.equal(run(model, x, mask), expected) and len(calls) == 4
    assert not any(module._forward_pre_hooks for module in model.modules())
