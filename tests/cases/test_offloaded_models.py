"""Models whose weights accelerate keeps elsewhere between forwards: adapters act, and what cannot be says so."""

from __future__ import annotations

import accelerate
import pytest
import torch
from tiny import FAMILIES, peft_model, save_each, tiny_model, token_ids

import ia3rt

IDS = token_ids()
CPU = torch.device("cpu")
MAPS = {
    "llama": {"model.layers.0": "disk", **dict.fromkeys(["model.embed_tokens", "model.layers.1", "model.norm"], "cpu")},
    "gpt2": {
        "transformer.h.0": "disk",
        **dict.fromkeys([f"transformer.{n}" for n in ("wte", "wpe", "h.1", "ln_f")], "cpu"),
    },
}


def _to_cpu(model, family, folder):
    accelerate.cpu_offload(model, execution_device=CPU)


def _to_disk(model, family, folder):
    accelerate.disk_offload(model, folder, execution_device=CPU)


def _dispatched(model, family, folder):
    rest = {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    device_map = {**MAPS[family], **{name: where for name, where in rest.items() if _has(model, name)}}
    accelerate.dispatch_model(model, device_map, main_device=CPU, offload_dir=folder)


def _has(model, name):
    return name in dict(model.named_modules())


def run(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=[_to_cpu, _to_disk, _dispatched])
def offload(request, family, tmp_path):
    def offloaded(model):
        request.param(model, family, tmp_path)
        return model

    return offloaded


@pytest.mark.parametrize("first", ["offloaded", "patched"])
def test_adapters_act_as_in_a_model_that_is_all_there(family, offload, first, tmp_path):
    wrapped = peft_model(tiny_model(family), family)
    folders = save_each(wrapped, tmp_path / "adapters")
    model = tiny_model(family)
    if first == "offloaded":
        runtime = ia3rt.patch(offload(model))
    else:
        runtime = ia3rt.patch(model)
        offload(model)
    assert any(parameter.is_meta for parameter in model.parameters())
    for folder in folders:
        runtime.load_adapter(folder)
    expected = {}
    for name in "bcd":
        runtime.set_adapter(name)
        wrapped.set_adapter(name)
        expected[name] = run(wrapped)
        torch.testing.assert_close(run(model), expected[name], rtol=1e-5, atol=1e-5)
    with runtime.route(["b", None, "d"]):
        mixed = torch.stack([expected["b"][0], run(tiny_model(family))[1], expected["d"][2]])
        torch.testing.assert_close(run(model), mixed, rtol=1e-4, atol=1e-5)
    runtime.unpatch()
    assert torch.equal(run(model), run(tiny_model(family)))


def test_the_adapters_stay_where_the_model_computes(family, offload):
    model = offload(tiny_model(family))
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a", {site.key: torch.full((site.width,), 0.5) for site in runtime.sites})
    runtime.set_adapter("a")
    before = run(model)
    for parameter in model.modules():
        parameter._apply(lambda tensor: tensor, recurse=False)
    assert torch.equal(run(model), before)


def test_what_needs_the_weights_themselves_is_refused(family, offload):
    model = offload(tiny_model(family))
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a", {site.key: torch.rand(site.width) for site in runtime.sites})
    before = run(model)
    with pytest.raises(ValueError, match=r"cannot merge into '.*': accelerate offloads its weight"):
        runtime.merge_adapter("a")
    with pytest.raises(ValueError, match="adapter 'a' acts at .*, whose weights accelerate offloads"):
        runtime.train_adapter("a")
    assert torch.equal(run(model), before)
    assert not [name for name, _ in model.named_parameters() if "ia3" in name]


def test_vectors_that_peft_lost_on_the_meta_device_are_named(family):
    wrapped = peft_model(tiny_model(family), family)
    accelerate.cpu_offload(wrapped, execution_device=CPU)
    with pytest.raises(ValueError, match=r"the vector of adapter 'b' at '.*' is on the meta device"):
        ia3rt.patch(wrapped)


def test_a_model_that_was_never_loaded_is_named(family):
    with torch.device("meta"):
        model = type(tiny_model(family))(tiny_model(family).config)
    with pytest.raises(ValueError, match="no weights yet .*no hook of accelerate's"):
        ia3rt.patch(model)
