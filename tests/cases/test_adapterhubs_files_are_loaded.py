"""AdapterHub's IA³ adapters, with what the package adapters 1.3.0 computed for them.

tests/cases/adapterhub has its files, as `save_adapter(folder, name, use_safetensors=True)` wrote them, and logits.json:
the outputs of the model below with that adapter active, its head trained, by that package on transformers 4.57.6.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import ia3rt
from ia3rt.adapters.checkpoint import is_ia3, read_checkpoint
from ia3rt.cli.main import app

FILES = Path(__file__).parent / "adapterhub"
IDS = torch.arange(10).reshape(2, 5)
BERT = dict(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=8,
    num_labels=3,
)


def model_of(kind: str) -> nn.Module:
    """The model, biases and all filled with numbers that are the same everywhere."""
    model: nn.Module = (
        BertForSequenceClassification(BertConfig(**BERT))
        if kind == "bert"
        else GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.eval()


def patched(kind: str) -> tuple[ia3rt.Runtime, nn.Module]:
    model = model_of(kind)
    names = {"target_modules": ["key", "value", "intermediate.dense", "output.dense"]} if kind == "bert" else {}
    return ia3rt.patch(model, **names), model


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FILES / "bert", tmp_path / "bert"))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("pickled", [False, True])
def test_it_computes_what_adapterhub_computed(kind: str, pickled: bool, tmp_path: Path) -> None:
    """With biases: only AdapterHub's merge leaves them unscaled. And a head that is the model's own brings nothing."""
    folder = Path(shutil.copytree(FILES / kind, tmp_path / kind))
    if pickled:
        for name, old in (
            ("adapter.safetensors", "pytorch_adapter.bin"),
            ("model_head.safetensors", "pytorch_model_head.bin"),
        ):
            torch.save(load_file(folder / name), folder / old)
            (folder / name).unlink()
    runtime, model = patched(kind)
    base = output(model)
    runtime.load_adapter(folder, "a")
    runtime.set_adapter("a")
    expected = torch.tensor(json.loads((folder / "logits.json").read_text()))
    assert not torch.allclose(base, expected, atol=1e-2)
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-5)
    runtime.save_adapter("a", tmp_path / "peft")
    assert ("classifier.weight" in str(load_file(tmp_path / "peft" / "adapter_model.safetensors").keys())) == (
        kind == "bert"
    )
    again, other = patched(kind)
    again.load_adapter(tmp_path / "peft", "a")
    again.set_adapter("a")
    assert torch.equal(output(other), output(model))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_peft_computes_it_too_once_it_is_converted(kind: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(FILES / kind), "-o", str(tmp_path / "new"), "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["converted_from"], said["written_by"]) == ("AdapterHub", "PEFT")
    loaded = peft.PeftModel.from_pretrained(model_of(kind), tmp_path / "new").eval()
    expected = torch.tensor(json.loads((FILES / kind / "logits.json").read_text()))
    torch.testing.assert_close(output(loaded), expected, rtol=1e-5, atol=1e-5)


def test_alpha_scales_the_vectors(folder: Path) -> None:
    before = read_checkpoint(folder).vectors
    _set(folder, alpha=2)
    assert all(torch.equal(2 * before[key], vector) for key, vector in read_checkpoint(folder).vectors.items())


def test_inspect_says_whose_format_it_is_and_what_of_the_bias(folder: Path) -> None:
    printed = CliRunner().invoke(app, ["inspect", str(folder)])
    text = " ".join(printed.output.split())
    assert printed.exit_code == 0
    assert "AdapterHub's; all its vectors act at outputs and scale the bias too" in text
    assert "classifier the head that was saved" in text


def _set(folder: Path, **settings: object) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["config"].update(settings)
    file.write_text(json.dumps(config))


def _lora(folder: Path) -> None:
    _set(folder, composition_mode="add", r=8)


def _bottleneck(folder: Path) -> None:
    file = folder / "adapter_config.json"
    settings = {"mh_adapter": True, "reduction_factor": 16}
    file.write_text(json.dumps({**json.loads(file.read_text()), "config": settings}))


def _gating(folder: Path) -> None:
    _set(folder, use_gating=True)


def _other_key(folder: Path) -> None:
    file = folder / "adapter.safetensors"
    save_file({**load_file(file), "bert.encoder.layer.0.attention.self.key.loras.mine.lora_A": torch.ones(1, 8)}, file)


def _flat(folder: Path) -> None:
    file = folder / "adapter.safetensors"
    save_file({key: tensor.flatten() for key, tensor in load_file(file).items()}, file)


def _flexible_head(folder: Path) -> None:
    save_file({"heads.mine.1.weight": torch.ones(3, 8)}, folder / "model_head.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_lora, "an AdapterHub adapter of kind 'lora' .composition_mode 'add'.: ia3rt runs IA³"),
        (_bottleneck, "an AdapterHub adapter of kind .*'reduction_factor': 16.* .composition_mode None."),
        (_gating, "with use_gating: its scale depends on the input"),
        (_other_key, "lora_A', which is no IA³ vector of AdapterHub"),
        (_flat, r"key' has shape \(8,\): AdapterHub's have \[out_features, 1\]"),
        (_flexible_head, "'heads.mine.1.weight', a head of one of AdapterHub's own model classes"),
    ],
)
def test_what_is_not_ia3_is_named_and_refused(folder: Path, change: object, message: str) -> None:
    change(folder)  # type: ignore[operator]
    runtime, model = patched("bert")
    before = output(model)
    with pytest.raises(ValueError, match=message):
        runtime.load_adapter(folder)
    assert runtime.adapters == []
    assert torch.equal(output(model), before)


def test_a_server_takes_it_for_ia3(folder: Path) -> None:
    assert is_ia3(folder)
    _lora(folder)
    assert not is_ia3(folder)


def test_without_weights_their_names_are_said(folder: Path) -> None:
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds neither adapter.safetensors nor pytorch_adapter.bin"):
        read_checkpoint(folder)
