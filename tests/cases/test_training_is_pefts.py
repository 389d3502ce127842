"""The Trainer makes of an adapter what it makes of PEFT's; and of several in one batch what it makes of each."""

from __future__ import annotations

import peft
import pytest
import torch
from tiny import TARGETS, peft_vectors, tiny_model, token_ids
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import ia3rt

SETTINGS = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "autocast": {"bf16": True},
    "both": {"bf16": True, "gradient_checkpointing": True},
}


def trainer(model, folder, settings):
    data = [{"input_ids": row, "labels": row} for row in token_ids(8)]
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=0.05,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    return Trainer(model, arguments, train_dataset=data)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_the_trainer_learns_what_it_learns_of_pefts(settings, tmp_path):
    model = tiny_model()
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a")
    runtime.train_adapter("a")
    trainer(model, tmp_path, settings).train()
    runtime.end_training()
    config = peft.IA3Config(**TARGETS["llama"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(tiny_model(), config, adapter_name="q")
    trainer(wrapped, tmp_path, settings).train()
    ours, pefts = runtime.get_adapter("a").vectors, peft_vectors(wrapped, "q")
    # In bfloat16 a gradient is rounded in another place; each of the four steps is of 0.05 at most.
    close = 5e-3 if "bf16" in settings else 1e-6
    for key, vector in pefts.items():
        assert (vector - 1).abs().max() > 0.05
        torch.testing.assert_close(ours[key].double(), vector, rtol=0, atol=close)


def two_adapters(checkpointing):
    model = tiny_model().train()
    runtime = ia3rt.patch(model)
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        vectors = {site.key: torch.empty(site.width).uniform_(0.5, 1.5, generator=generator) for site in runtime.sites}
        runtime.add_adapter(name, vectors)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model, runtime


def backward(model, ids):
    """Of a sum over rows, so that each row's part is its own."""
    logits = model(ids, use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    return {name: each.grad for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_adapters_in_one_mixed_batch_learn_what_each_learns_alone(checkpointing):
    ids = token_ids(4)
    model, runtime = two_adapters(checkpointing)
    runtime.train_adapter(["a", "b"])
    with runtime.route(["a", "b", "b", "a"]):
        mixed = backward(model, ids)
    alone = {}
    for name, rows in (("a", [0, 3]), ("b", [1, 2])):
        model, runtime = two_adapters(checkpointing)
        runtime.train_adapter(name)
        alone.update(backward(model, ids[rows]))
    assert mixed.keys() == alone.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(mixed[name], gradient, rtol=1e-4, atol=1e-5)
