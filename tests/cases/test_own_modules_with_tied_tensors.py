"""A head of a masked language model: its bias stands in it twice, and its matrix in the embeddings too."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from heads import SIZES, output, randomize, token_ids
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

import ia3rt

IDS = token_ids()
CONFIG = peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[], modules_to_save=["cls"])
BIASES = ("predictions.bias", "predictions.decoder.bias")


def masked_lm() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**SIZES)).eval()


def other_head(model: BertForMaskedLM) -> dict[str, Tensor]:
    """All but the matrix that is the embeddings' too is another; the bias is one tensor still."""
    state = {name: tensor + 0.3 * torch.randn(tensor.shape) for name, tensor in model.cls.state_dict().items()}
    state["predictions.decoder.weight"] = model.cls.state_dict()["predictions.decoder.weight"]
    return {**state, BIASES[1]: state[BIASES[0]]}


def test_it_is_merged_and_unmerged() -> None:
    model, right = masked_lm(), masked_lm()
    state = other_head(model)
    right.cls.load_state_dict(state)
    before = copy.deepcopy(model.state_dict())
    runtime = ia3rt.patch(model, target_modules=["key"])
    runtime.add_adapter("a", modules={"cls": state})
    runtime.set_adapter("a")
    assert torch.equal(output(model, IDS), output(right, IDS))
    runtime.merge_adapter()
    assert torch.equal(output(model, IDS), output(right, IDS))
    exported = masked_lm()
    exported.load_state_dict(model.state_dict())
    assert torch.equal(output(exported, IDS), output(right, IDS))
    runtime.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_merge_that_would_change_the_embeddings_is_refused() -> None:
    wrapped = peft.get_peft_model(masked_lm(), CONFIG).eval()
    randomize(wrapped, 1)
    right = output(wrapped, IDS)
    runtime = ia3rt.patch(wrapped)
    sentence = "own 'cls': .* 'predictions.decoder.weight' with 'bert.embeddings.word_embeddings.weight'"
    with pytest.raises(ValueError, match=sentence):
        runtime.merge_and_unload()
    assert torch.equal(output(runtime.model, IDS), right)


def test_a_merge_of_two_contents_for_one_tensor_is_refused() -> None:
    model = masked_lm()
    state = other_head(model)
    state[BIASES[1]] = state[BIASES[0]] + 1
    runtime = ia3rt.patch(model, target_modules=["key"])
    runtime.add_adapter("a", modules={"cls": state})
    with pytest.raises(ValueError, match="own 'cls': .* shares its 'predictions.(decoder.)?bias' with 'cls.pred"):
        runtime.merge_adapter("a")


def test_it_is_trained_as_one_tensor() -> None:
    """PEFT's copy keeps it one."""
    theirs, ours = peft.get_peft_model(masked_lm(), CONFIG), masked_lm()
    runtime = ia3rt.patch(ours, target_modules=["key", "value"])
    runtime.add_adapter("a", config={"modules_to_save": ["cls"]})
    parameters = runtime.train_adapter("a")
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    assert sorted(map(torch.numel, parameters)) == sorted(map(torch.numel, trained))
    assert {id(p) for p in ours.parameters() if p.requires_grad} == {id(p) for p in parameters}
    both: list[tuple[Any, list[nn.Parameter]]] = [(theirs, trained), (ours, parameters)]
    for model, each in both:
        optimizer = torch.optim.SGD(each, lr=0.1)
        for _ in range(3):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    runtime.end_training()
    assert not any("ia3" in name for name, _ in ours.named_parameters())
    torch.testing.assert_close(output(ours, IDS), output(theirs, IDS), rtol=1e-5, atol=1e-6)
    own = runtime.get_adapter("a").modules["cls"]
    assert torch.equal(own[BIASES[0]], own[BIASES[1]])
    assert not torch.equal(own[BIASES[0]], ours.state_dict()[f"cls.{BIASES[0]}"])
