"""What writing into a tensor changes, and that merging never changes anything else."""

from __future__ import annotations

import copy

import pytest
import torch
from mixtures import tiny_mixture
from tiny import logits, tiny_model, token_ids
from torch import nn

import ia3rt
from ia3rt.modules.memory import Memory, repeats


def views():
    """Tensors over one buffer, by name."""
    whole = torch.arange(64.0)
    square = whole.view(8, 8)
    return {
        "first": square[:4],
        "second": square[4:],
        "across": square[2:6],
        "left": square[:, :4],
        "right": square[:, 4:],
        "odd": whole[1::2],
        "even": whole[::2],
        "turned": square.t()[:4],
        "bytes": whole[:8].view(torch.int16),
        "alone": torch.arange(64.0).view(8, 8),
    }


def test_what_is_over_the_same_bytes_is_found_and_nothing_else():
    """The truth is to write: what changes then is over the same bytes."""
    for name in views():
        model, held = nn.Module(), views()
        for each, tensor in held.items():
            model.register_module(each, nn.Module())
            model.get_submodule(each).register_buffer("weight", tensor)
        before = {each: tensor.clone() for each, tensor in held.items()}
        found = {other.path for other in Memory(model).others(model.get_submodule(name), "weight")}
        held[name].add_(1000)
        assert found == {each for each in held if each != name and not torch.equal(held[each], before[each])}, name


def test_what_repeats():
    row = torch.ones(1, 4)
    assert repeats(row.expand(3, 4)) and repeats(torch.ones(6).as_strided((3, 3), (1, 1)))
    assert not any(map(repeats, (row, row.expand(1, 4), torch.ones(3, 4).t(), torch.ones(8, 8)[::2, ::3], row[:0])))


def pair():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def one_bias():
    model = pair()
    model[1].bias = model[0].bias
    return model


def one_weight_twice():
    model = pair()
    model[1].weight = nn.Parameter(model[0].weight.data)
    return model


def over_each_other():
    model, whole = pair(), torch.randn(6, 4)
    model[0].weight, model[1].weight = nn.Parameter(whole[:4]), nn.Parameter(whole[2:])
    return model


@pytest.mark.parametrize("sites", [["0"], ["0", "1"]], ids=len)
@pytest.mark.parametrize(
    ("make", "name"), [(one_bias, "bias"), (one_weight_twice, "weight"), (over_each_other, "weight")]
)
def test_what_two_layers_share_is_not_merged_into(make, name, sites):
    model = make()
    before = copy.deepcopy(model.state_dict())
    runtime = ia3rt.patch(model, target_modules=sites)
    runtime.add_adapter("a", {path: torch.full((4,), 2.0) for path in sites})
    with pytest.raises(ValueError, match=rf"cannot merge into '0': it shares its {name} with \['1'\]"):
        runtime.merge_adapter("a")
    runtime.unpatch()
    assert all(torch.equal(tensor, before[each]) for each, tensor in model.state_dict().items())


def test_a_bias_that_is_not_written_may_be_shared():
    model, x = one_bias(), torch.randn(3, 4)
    runtime = ia3rt.patch(model, target_modules=["0"], feedforward_modules=["0"])
    runtime.add_adapter("a", {("0", "in"): torch.rand(4)})
    runtime.set_adapter("a")
    worn = model(x)
    runtime.merge_adapter()
    torch.testing.assert_close(model(x), worn)


def test_views_beside_each_other_are_merged():
    model, whole, x = pair(), torch.randn(8, 4), torch.randn(3, 4)
    model[0].weight, model[1].weight = nn.Parameter(whole[:4]), nn.Parameter(whole[4:])
    runtime = ia3rt.patch(model, target_modules=["0", "1"])
    runtime.add_adapter("a", {"0": torch.rand(4), "1": torch.rand(4)})
    runtime.set_adapter("a")
    worn, before = model(x), whole.clone()
    runtime.merge_adapter()
    torch.testing.assert_close(model(x), worn)
    runtime.unmerge_adapter()
    assert torch.equal(whole, before)


def test_an_embedding_under_another_name_is_found():
    model = tiny_model()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    before = logits(model, token_ids())
    runtime = ia3rt.patch(model, target_modules=["lm_head", "k_proj"])
    runtime.add_adapter("vector", {"lm_head": torch.rand(128)})
    with pytest.raises(ValueError, match=r"'lm_head': it shares its weight with \['model.embed_tokens'\]"):
        runtime.merge_adapter("vector")
    runtime.add_adapter("own", modules={"lm_head": {"weight": torch.randn(128, 64)}})
    with pytest.raises(ValueError, match="the own 'lm_head': the model's shares its weight with 'model.embed_tokens'"):
        runtime.merge_adapter("own")
    assert torch.equal(logits(runtime.unpatch(), token_ids()), before)


def test_experts_that_share_their_biases_are_not_merged_into():
    model = tiny_mixture("gpt_oss")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.gate_up_proj_bias = first.gate_up_proj_bias
    before = logits(model, token_ids())
    runtime = ia3rt.patch(model, target_modules=["experts.gate_up_proj"])
    runtime.add_adapter("a", {site.key: torch.rand(site.width) for site in runtime.sites})
    shared = r"shares its gate_up_proj_bias with \['model.layers.1.mlp.experts'\]"
    with pytest.raises(ValueError, match=rf"'model.layers.0.mlp.experts.gate_up_proj': it {shared}"):
        runtime.merge_adapter("a")
    assert torch.equal(logits(runtime.unpatch(), token_ids()), before)


def test_a_weight_of_which_elements_are_one_is_refused():
    model = pair()
    model[1].weight = nn.Parameter(torch.randn(1, 4).expand(4, 4))
    before = model[0].weight.detach().clone()
    runtime = ia3rt.patch(model, target_modules=["0", "1"])
    runtime.add_adapter("a", {"0": torch.rand(4), "1": torch.rand(4)})
    with pytest.raises(ValueError, match=r"cannot merge into '1': elements of its tensor \(4, 4\) are one place"):
        runtime.merge_adapter("a")
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("made", [True, False], ids=["made in inference mode", "made outside"])
@pytest.mark.parametrize("merged", [True, False], ids=["merged in it", "merged outside"])
def test_inference_mode_is_no_obstacle(made, merged):
    with torch.inference_mode(made):
        model = pair()
    x = torch.randn(3, 4)
    with torch.inference_mode():
        before = model(x)
    runtime = ia3rt.patch(model, target_modules=["0", "1"])
    runtime.add_adapter("a", {"0": torch.rand(4), "1": torch.rand(4)})
    runtime.set_adapter("a")
    with torch.inference_mode():
        worn = model(x)
        with torch.inference_mode(merged):
            runtime.merge_adapter()
        torch.testing.assert_close(model(x), worn)
    runtime.unpatch()
    with torch.inference_mode():
        assert torch.equal(model(x), before)
