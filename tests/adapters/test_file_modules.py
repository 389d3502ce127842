"""Weights that PEFT saves beside a vector: they are the model's to whoever combines files, and to PEFT afterwards."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from commands import done, fails, run
from safetensors.torch import load_file, save_file
from tiny import logits, randomize, tiny_model, token_ids
from torch import Tensor

import ia3rt

IDS, FILE = token_ids(), "adapter_model.safetensors"
WEIGHT = "base_model.model.lm_head.base_layer.weight"


def saved(folder: Path, seed: int, targets: list[str]) -> Path:
    config = peft.IA3Config(target_modules=targets, feedforward_modules=[], init_ia3_weights=False)
    wrapped = peft.get_peft_model(tiny_model(), config)
    randomize(wrapped, seed)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Of a, b and c, a and b have a vector for lm_head, beside which PEFT saves the weight of it."""
    made = {
        name: saved(tmp_path / name, seed, ["k_proj", *head])
        for seed, (name, head) in enumerate({"a": ["lm_head"], "b": ["lm_head"], "c": []}.items())
    }
    assert [WEIGHT in load_file(folder / FILE) for folder in made.values()] == [True, True, False]
    return made


def weight(folder: Path, change: Tensor) -> None:
    tensors = load_file(folder / FILE)
    save_file({**tensors, WEIGHT: tensors[WEIGHT] * change}, folder / FILE, metadata={"format": "pt"})


@pytest.mark.parametrize(("names", "kind"), [("ab", "product"), ("ac", "delta"), ("ca", "ties"), ("a", "negate")])
def test_a_target_lm_head_combines_as_in_a_model(
    names: str, kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    done("combine", *(folders[name] for name in names), "-o", tmp_path / "new", "--type", kind)
    model = tiny_model()
    runtime = ia3rt.patch(model)
    for name in names:
        runtime.load_adapter(folders[name], name)
    runtime.add_weighted_adapter([*names], None, "new", kind)
    runtime.set_adapter("new")
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "new")
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))
    runtime.load_adapter(tmp_path / "new", "read")
    runtime.set_adapter("read")
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))


def test_what_is_converted_means_to_peft_what_was_read(folders: dict[str, Path], tmp_path: Path) -> None:
    weight(folders["a"], torch.tensor(2.0))  # as of another vocabulary than the model's
    done("convert", folders["a"], "-o", tmp_path / "new")
    given, made = (
        logits(peft.PeftModel.from_pretrained(tiny_model(), folder), IDS) for folder in (folders["a"], tmp_path / "new")
    )
    assert torch.equal(given, made)


def test_different_weights_of_one_layer_are_told(folders: dict[str, Path], tmp_path: Path) -> None:
    weight(folders["b"], torch.tensor(2.0))
    result = run("combine", folders["a"], folders["b"], "-o", tmp_path / "new")
    fails(result, 1, f"adapters '{folders['a']}' and '{folders['b']}' are of different models", "at 'lm_head'")
    assert not (tmp_path / "new").exists()
