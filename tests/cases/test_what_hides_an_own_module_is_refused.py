"""What other code does after patch() to a module of which adapters have their own hides none, or is an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from heads import SIZES, model_of, output, token_ids
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import ia3rt

IDS = token_ids()


def worn(model: nn.Module, path: str) -> tuple[Any, torch.Tensor]:
    """A runtime with an adapter that has its own module there, and what the model gives with it."""
    torch.manual_seed(3)
    state = {name: torch.randn(tensor.shape) for name, tensor in model.get_submodule(path).state_dict().items()}
    runtime = ia3rt.patch(model, target_modules=["k_proj", "key"])
    runtime.add_adapter("a", modules={path: state})
    runtime.set_adapter("a")
    return runtime, output(model, IDS)


def computes_the_same(model: Any) -> None:
    weight = model.state_dict()["score.weight"]
    model.score.forward = lambda x: F.linear(x, weight)


def another(model: Any) -> None:
    model.score = nn.Linear(32, 3, bias=False)


def another_beside_it(model: Any) -> None:
    model.kept, model.score = model.score, nn.Linear(32, 3, bias=False)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (computes_the_same, "module 'score' has a forward of its own, set by other code after patch"),
        (another, "a Linear was put in the place of 'score'"),
        (another_beside_it, "a Linear was put in the place of 'score'"),
    ],
)
def test_a_head(change: Callable[[Any], None], message: str, compiles: bool) -> None:
    model: Any = model_of("a linear head")
    runtime, right = worn(model, "score")
    torch._dynamo.reset()
    called = torch.compile(model, backend="eager") if compiles else model
    torch.testing.assert_close(output(called, IDS), right)
    head = model.score
    change(model)
    for name in ("a", None):
        runtime.set_adapter(name)
        for _ in range(2):
            with pytest.raises(Exception if compiles else ValueError, match=message):
                output(called, IDS)
    runtime.set_adapter("a")
    vars(head).pop("forward", None)
    model.score = head
    assert torch.equal(output(model, IDS), right)
    torch._dynamo.reset()


def test_a_forward_that_leads_on_is_worn() -> None:
    model: Any = model_of("a linear head")
    _, right = worn(model, "score")
    replaced = model.score.forward
    model.score.forward = lambda x: replaced(x) + 1
    assert torch.equal(output(model, IDS), right + 1)


def test_what_stands_around_it() -> None:
    model: Any = model_of("an lm_head")
    other: Any = model_of("an lm_head")
    runtime, right = worn(model, "model.layers.1.mlp.up_proj")
    block, mlp = model.model.layers[1], model.model.layers[1].mlp
    block.mlp = other.model.layers[1].mlp
    sentence = "a Linear was put in the place of 'model.layers.1.mlp.up_proj', or around it"
    with pytest.raises(ValueError, match=sentence):
        output(model, IDS)
    with pytest.raises(ValueError, match=sentence):  # a model inside it, that is called by itself
        model.model(IDS)
    block.mlp = mlp
    assert torch.equal(output(model, IDS), right)
    model.model.layers[1] = other.model.layers[1]
    with pytest.raises(ValueError, match=sentence):
        output(model, IDS)
    model.model.layers[1] = block
    assert torch.equal(output(model, IDS), right)
    runtime.unpatch()


def test_in_a_copy_of_the_model() -> None:
    model = model_of("a linear head")
    _, right = worn(model, "score")
    copied: Any = copy.deepcopy(model)
    assert torch.equal(output(copied, IDS), right)
    another(copied)
    with pytest.raises(ValueError, match="in the place of 'score'"):
        output(copied, IDS)
    assert torch.equal(output(model, IDS), right)


@pytest.mark.parametrize("path", ["lm_head", "model.embed_tokens"])
@pytest.mark.parametrize("name", ["a", None])
def test_embeddings_are_resized(path: str, name: str | None) -> None:
    model: Any = model_of("an lm_head")
    runtime, _ = worn(model, path)
    runtime.set_adapter(name)
    model.resize_token_embeddings(120)
    sentence = "put in the place of 'lm_head'" if path == "lm_head" else "'model.embed_tokens' had 99 rows .* 120 now"
    for _ in range(2):
        with pytest.raises(ValueError, match=sentence):
            output(model, IDS)


def test_layers_that_were_taken_out_are_no_error() -> None:
    model: Any = model_of("an lm_head")
    runtime, _ = worn(model, "model.layers.1.mlp.up_proj")
    right: Any = model_of("an lm_head")
    own = runtime.get_adapter("a").modules["model.layers.1.mlp.up_proj"]["weight"]
    right.model.layers[1].mlp.up_proj.weight.data = own
    for keep in (slice(1, 2), slice(0, 1)):
        kept = []
        for each in (model, right):
            kept.append(each.model.layers)
            each.model.layers = each.model.layers[keep]
        torch.testing.assert_close(_hidden(model), _hidden(right))
        for each, layers in zip((model, right), kept, strict=True):
            each.model.layers = layers


def _hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS, use_cache=False).logits
    return result


def test_a_module_that_nobody_has_of_their_own_any_more_may_be_replaced() -> None:
    model: Any = model_of("a linear head")
    runtime, _ = worn(model, "score")
    runtime.set_adapter(None)
    runtime.delete_adapter("a")
    another(model)
    base = output(model, IDS)
    weight = torch.randn(3, 32)
    runtime.add_adapter("b", modules={"score": {"weight": weight}})
    assert torch.equal(output(model, IDS), base)
    runtime.set_adapter("b")
    right: Any = model_of("a linear head")
    right.score.weight.data = weight
    assert torch.equal(output(model, IDS), output(right, IDS))
    assert runtime.unpatch() is model
    assert torch.equal(output(model, IDS), base)


def test_a_model_that_was_changed_can_be_unpatched() -> None:
    model: Any = BertForSequenceClassification(BertConfig(**SIZES)).eval()
    runtime, _ = worn(model, "bert.pooler")
    pooler = model.bert.pooler
    model.bert.pooler = BertForSequenceClassification(model.config).bert.pooler
    with pytest.raises(ValueError, match="in the place of 'bert.pooler'"):
        model.bert(IDS)
    runtime.unpatch()
    assert type(pooler).__name__ == "BertPooler"
    assert not any("ia3" in name for module in (model, pooler) for name in vars(module))
    output(model, IDS)


def test_a_forward_on_a_part_that_an_adapters_own_would_not_have() -> None:
    model: Any = model_of("a head of two layers")
    dense = model.classifier.dense
    dense.forward = lambda x: F.linear(x, dense.weight) * 2
    with pytest.raises(ValueError, match="'dense' in module 'classifier' has a forward of its own, set by other code"):
        worn(model, "classifier")
