"""Code that makes the model's new parts of those that it has takes the model's, whatever adapter with its own is worn.

The truth is the same change of a model that was never patched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import logits, patched, tiny_model, token_ids
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import ia3rt

IDS = token_ids()
HEAD, LAYER = "lm_head", "model.layers.0.mlp.down_proj"


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def quantized(layer: nn.Module) -> None:
    """torchao's weight, of one layer."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(
        nn.ModuleList([layer]), quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, name: module is layer
    )


CHANGES: dict[str, Callable[[Any], object]] = {
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "pruning for good": lambda layer: prune.remove(prune.l1_unstructured(layer, "weight", 0.3), "weight"),
    "a parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "two parametrizations": lambda layer: [
        parametrize.register_parametrization(layer, "weight", Doubled()) for _ in range(2)
    ],
    "a parametrization for good": lambda layer: (
        parametrize.register_parametrization(layer, "weight", Doubled()),
        parametrize.remove_parametrizations(layer, "weight"),
    ),
    "a norm": parametrizations.weight_norm,
    "quantisation": quantized,
}


def wearing(path: str) -> ia3rt.Runtime:
    """A model that wears an adapter with its own module; another has vectors."""
    runtime = patched(tiny_model(), "b")
    own = copy.deepcopy(tiny_model().get_submodule(path))
    runtime.add_adapter("a", modules={path: {name: 3 * tensor for name, tensor in own.state_dict().items()}})
    runtime.set_adapter("a")
    return runtime


def changed(path: str, change: Callable[[Any], object]) -> nn.Module:
    model = tiny_model()
    change(model.get_submodule(path))
    return model


@pytest.mark.parametrize("path", [HEAD, LAYER])
@pytest.mark.parametrize("change", CHANGES)
def test_it_is_made_of_the_models(change: str, path: str) -> None:
    truth = changed(path, CHANGES[change])
    runtime = wearing(path)
    model = runtime.model
    worn = logits(model, IDS)
    CHANGES[change](model.get_submodule(path))
    assert torch.equal(logits(model, IDS), worn), "an adapter's own stays"
    for _ in range(2):
        runtime.set_adapter(None)
        torch.testing.assert_close(logits(model, IDS), logits(truth, IDS))
        runtime.set_adapter("a")
        assert torch.equal(logits(model, IDS), worn)
    with pytest.warns(UserWarning, match="a part of a patched model"):
        part = copy.deepcopy(model.get_submodule(path))
    runtime.unpatch()
    assert model.state_dict().keys() == truth.state_dict().keys()
    torch.testing.assert_close(logits(model, IDS), logits(truth, IDS))
    x = torch.randn(2, part.in_features)
    torch.testing.assert_close(part(x), truth.get_submodule(path)(x))
    assert not [name for cls in type(model.get_submodule(path)).__mro__ for name in vars(cls) if "ia3_" in name]


def test_resized_embeddings_are_the_models() -> None:
    def resize(model: Any) -> None:
        torch.manual_seed(3)
        model.resize_token_embeddings(140, mean_resizing=False)

    runtime, truth = wearing(HEAD), tiny_model()
    for model in (runtime.model, truth):
        resize(model)
    with pytest.raises(ValueError, match="a Linear was put in the place of 'lm_head'"):
        runtime.model(IDS)
    assert torch.equal(logits(runtime.unpatch(), IDS), logits(truth, IDS))


def test_weights_that_a_model_begins_with_are_put_in_its_own() -> None:
    model, truth = wearing(HEAD).model, tiny_model()
    worn, own = logits(model, IDS), model.lm_head.weight
    for each in (model, truth):
        for parameter in each.lm_head.parameters():
            parameter._is_hf_initialized = False
        each.lm_head._is_hf_initialized = False
        torch.manual_seed(4)
        each._initialize_weights(each.lm_head)
    assert torch.equal(model.get_parameter("lm_head.weight"), truth.lm_head.weight)
    assert not torch.equal(truth.lm_head.weight, tiny_model().lm_head.weight)
    assert torch.equal(logits(model, IDS), worn) and model.lm_head.weight is own


def test_what_a_user_reads_is_what_is_worn() -> None:
    model = wearing(HEAD).model
    assert torch.equal(model.lm_head.weight, 3 * tiny_model().lm_head.weight)
    assert torch.equal(model.get_output_embeddings().weight, model.lm_head.weight)
