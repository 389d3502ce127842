"""diffusers' models: attention, feed-forward and convolutions wear what they wear in PEFT."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from tiny import randomize, save_each
from torch import nn

import ia3rt

lora = pytest.importorskip("diffusers.models.lora")
from diffusion import MODELS  # noqa: E402  (imports diffusers)

SUM = {"b": 0.25, "d": -0.7}
ROWS = ["b", None, ["c", "d"], SUM]


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request, tmp_path_factory):
    make, inputs, targets = MODELS[request.param]
    plain = make()
    configs = {name: peft.IA3Config(**targets) for name in "bcd"}
    wrapped = peft.get_peft_model(copy.deepcopy(plain), configs["b"], adapter_name="b")
    for name in "cd":
        wrapped.add_adapter(name, configs[name])
    randomize(wrapped, seed=2)
    runtime = ia3rt.patch(plain)
    for folder in save_each(wrapped.eval(), tmp_path_factory.mktemp("adapters")):
        runtime.load_adapter(folder)
    wrapped.base_model.add_weighted_adapter(["b", "d"], list(SUM.values()), "sum")
    return wrapped, runtime, inputs


@torch.no_grad()
def peft_output(wrapped, spec, inputs):
    if spec is None:
        with wrapped.disable_adapter():
            return wrapped(**inputs).sample
    wrapped.base_model.set_adapter(["sum"] if isinstance(spec, dict) else [spec] if isinstance(spec, str) else spec)
    return wrapped(**inputs).sample


@torch.no_grad()
def output(runtime, inputs):
    return runtime.model(**inputs).sample


@pytest.mark.parametrize("spec", ["b", ["b", "c", "d"], None], ids=str)
def test_a_product_is_pefts_to_the_bit(pair, spec):
    wrapped, runtime, inputs = pair
    runtime.set_adapter(spec)
    assert torch.equal(output(runtime, inputs(2)), peft_output(wrapped, spec, inputs(2)))


def test_a_weighted_sum_is_pefts(pair):
    wrapped, runtime, inputs = pair
    runtime.set_adapter(SUM)
    expected = peft_output(wrapped, SUM, inputs(2))
    torch.testing.assert_close(output(runtime, inputs(2)), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, peft_output(wrapped, None, inputs(2)), rtol=1e-2, atol=1e-3)


def test_each_row_is_pefts_row(pair):
    wrapped, runtime, inputs = pair
    given = inputs(len(ROWS))
    with runtime.route(ROWS):
        for _ in range(2):  # the first forward of its kind is looked at
            mixed = output(runtime, given)
            for row, spec in enumerate(ROWS):
                one = {name: x[row : row + 1] if x.dim() else x for name, x in given.items()}
                expected = peft_output(wrapped, spec, one)
                torch.testing.assert_close(mixed[row : row + 1], expected, rtol=1e-4, atol=1e-4)


def test_merging_is_wearing(pair):
    _, runtime, inputs = pair
    runtime.set_adapter("b")
    worn = output(runtime, inputs(2))
    runtime.merge_adapter()
    torch.testing.assert_close(output(runtime, inputs(2)), worn, rtol=1e-3, atol=1e-4)
    runtime.unmerge_adapter()
    assert torch.equal(output(runtime, inputs(2)), worn)


def test_a_wrapper_of_a_convolution_wears_it_and_is_merged_only_where_its_forward_is_known():
    with pytest.warns(FutureWarning):
        block = nn.ModuleDict({"conv": lora.LoRACompatibleConv(3, 4, 3)})
    x = torch.randn(2, 3, 5, 5)
    expected = block["conv"](x) * 3
    runtime = ia3rt.patch(block, target_modules=["conv"])
    runtime.add_adapter("a", {"conv": torch.full((4,), 3.0)})
    runtime.set_adapter("a")
    torch.testing.assert_close(block["conv"](x), expected)
    torch.testing.assert_close(block["conv"](hidden_states=x, scale=1.0), expected)
    with pytest.raises(ValueError, match="a LoRACompatibleConv has a forward of its own"):
        runtime.merge_adapter()
