"""Layers that other code moves, takes out or wraps after patch(): vectors follow them, and names mean no others.

The truth is a copy of the model with the vectors in its weights, changed in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import logits, patched, scaled, tiny_model, token_ids
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import ia3rt

IDS = token_ids()
UP = ("model.layers.0.mlp.up_proj", "out")


def swap(model: nn.Module) -> None:
    first, second = model.model.layers
    model.model.layers = nn.ModuleList([second, first])


def drop_first(model: nn.Module) -> None:
    model.model.layers = model.model.layers[1:]


def drop_last(model: nn.Module) -> None:
    model.model.layers = model.model.layers[:1]


def worn() -> tuple[ia3rt.Runtime, nn.Module]:
    """A model that wears `a`, and the truth."""
    runtime = patched(tiny_model())
    runtime.set_adapter("a")
    vectors = runtime.get_adapter("a").vectors
    return runtime, scaled(tiny_model(), {key: vector.double() for key, vector in vectors.items()})


def close(model: nn.Module, truth: nn.Module) -> None:
    torch.testing.assert_close(logits(model, IDS).double(), logits(truth, IDS).double(), rtol=1e-4, atol=1e-4)


def without_cache(model: nn.Module) -> None:
    model.config.use_cache = False  # whose layers are numbered


@pytest.mark.parametrize("move", [swap, drop_first, drop_last])
def test_what_goes_by_names_is_refused(move: Callable[[nn.Module], None], tmp_path: Path) -> None:
    runtime, truth = worn()
    for model in (runtime.model, truth):
        without_cache(model)
        move(model)
    close(runtime.model, truth)
    saved = tmp_path / "saved"
    other, _ = worn()
    other.save_adapter("b", tmp_path / "b")
    by_name = [
        runtime.merge_adapter,
        lambda: runtime.train_adapter("a"),
        lambda: runtime.save_adapter("a", saved),
        lambda: runtime.get_adapter("a"),
        lambda: runtime.add_adapter("new", {UP: torch.ones(96)}),
        lambda: runtime.load_adapter(tmp_path / "b", "c"),
        lambda: runtime.register({"d": tmp_path / "b"}) and runtime.set_adapter("d"),
    ]
    before = logits(runtime.model, IDS)
    for step in by_name:
        with pytest.raises(ValueError, match=r"the layer that wears the vectors of 'model\.layers.*unpatch\(\) before"):
            step()
        assert torch.equal(logits(runtime.model, IDS), before)
    assert runtime.adapters == ["a", "b"] and not saved.exists()


@pytest.mark.parametrize("move", [swap, drop_first, drop_last])
def test_unpatching_gives_all_of_them_back(move: Callable[[nn.Module], None]) -> None:
    runtime, _ = worn()
    layers, base = list(runtime.model.model.layers), tiny_model()
    for model in (runtime.model, base):
        without_cache(model)
        move(model)
    runtime.unpatch()
    assert torch.equal(logits(runtime.model, IDS), logits(base, IDS))
    assert not any("IA3" in type(module).__name__ for layer in layers for module in layer.modules())


def test_a_lora_around_a_layer_keeps_its_place() -> None:
    runtime, truth = worn()
    with_lora = []
    for model in (runtime.model, truth):
        torch.manual_seed(5)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        with_lora.append(get_peft_model(model, config, autocast_adapter_dtype=False).eval())
    with_lora[1].double()
    close(*with_lora)
    runtime.add_adapter("new", {UP: torch.ones(96)})
    close(*with_lora)
    with pytest.raises(ValueError, match=r"a Linear was put around the layer 'model\.layers\.0\.self_attn\.v_proj'"):
        runtime.merge_adapter()
    close(*with_lora)
    unwrapped = [model.unload() for model in with_lora]
    close(*unwrapped)
    runtime.merge_adapter()
    close(*unwrapped)


def test_a_wrapper_around_blocks_changes_no_names(tmp_path: Path) -> None:
    runtime, truth = worn()
    apply_activation_checkpointing(runtime.model, check_fn=lambda module: "DecoderLayer" in type(module).__name__)
    close(runtime.model, truth)
    runtime.save_adapter("a", tmp_path / "a")
    close(PeftModel.from_pretrained(tiny_model(), tmp_path / "a").eval(), truth)
    runtime.add_adapter("new", {("lm_head", "out"): torch.ones(128)})
    close(runtime.model, truth)
