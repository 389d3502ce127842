"""Keys as other tools write them are loaded; what is no IA³ adapter, or a damaged one, is named for what it is.

After peft#2699, diffusers#11675 and alpaca-lora#446. The truth is PEFT, on the file as PEFT wrote it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from heads import adapted, model_of, output, saved, token_ids
from safetensors.torch import load_file, save_file
from torch import Tensor

import ia3rt

IDS = token_ids()
KIND = "a linear head"
CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
Change = Callable[[str], str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    right = saved(KIND, tmp_path, {"a": 1}, IDS)["a"]
    torch.save(right, tmp_path / "right.pt")
    return tmp_path / "a"


def right(folder: Path) -> Tensor:
    loaded: Tensor = torch.load(folder.parent / "right.pt")
    return loaded


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / FILE)), folder / FILE)


def loaded(folder: Path) -> Tensor:
    model = model_of(KIND)
    runtime = ia3rt.patch(model)
    runtime.load_adapter(folder)
    runtime.set_adapter("a")
    return output(model, IDS)


def _of_adapter(name: str) -> Change:
    """As state_dict() has them."""

    def change(key: str) -> str:
        return key.replace("score.", f"score.modules_to_save.{name}.") if "score" in key else f"{key}.{name}"

    return change


@pytest.mark.parametrize(
    "change",
    [
        _of_adapter("default"),
        _of_adapter("mine"),
        lambda key: key.removeprefix("base_model.model."),
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.replace("layers.1.", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module."),
        lambda key: f"module.{key.removeprefix('base_model.model.')}",
        lambda key: _of_adapter("mine")(f"module.{key}"),
    ],
)
def test_keys_of_other_writers_are_loaded(folder: Path, change: Change) -> None:
    rewrite(folder, lambda tensors: {change(key): tensor for key, tensor in tensors.items()})
    assert torch.equal(loaded(folder), right(folder))


def test_peft_loads_keys_with_the_adapters_name_too(folder: Path) -> None:
    """So they are no fault of the file's."""
    rewrite(folder, lambda ts: {key if "score" in key else f"{key}.default": tensor for key, tensor in ts.items()})
    wrapped = peft.PeftModel.from_pretrained(model_of(KIND), folder).eval()
    assert torch.equal(output(wrapped, IDS), right(folder))
    assert torch.equal(loaded(folder), right(folder))


def test_a_whole_state_dict_is_loaded_into_its_model(folder: Path) -> None:
    """torch.save(peft_model.state_dict()): the base model's weights are there as well, and are the model's."""
    wrapped = adapted(model_of(KIND), KIND, 1)
    (folder / FILE).unlink()
    torch.save(wrapped.state_dict(), folder / "adapter_model.bin")
    assert torch.equal(loaded(folder), right(folder))


def test_a_whole_state_dict_of_another_model_is_refused(folder: Path) -> None:
    state = adapted(model_of(KIND), KIND, 1).state_dict()
    (folder / FILE).unlink()
    torch.save({key: t + 1 if "layernorm" in key else t for key, t in state.items()}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="weights for 'model.layers.0.input_layernorm' .weight., other ones than the"):
        loaded(folder)


def test_a_root_that_is_called_module_is_no_wrapper(tmp_path: Path) -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.module = torch.nn.Sequential(torch.nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.module(x)
            return y

    wrapped = peft.get_peft_model(Wrapped(), peft.IA3Config(target_modules=["0"], feedforward_modules=[]))
    torch.nn.init.normal_(wrapped.get_base_model().module[0].ia3_l["default"])
    wrapped.save_pretrained(tmp_path / "a")
    model, x = Wrapped(), torch.randn(2, 8)
    runtime = ia3rt.patch(model, target_modules=["0"])
    runtime.load_adapter(tmp_path / "a")
    runtime.set_adapter("a")
    assert torch.equal(model(x), wrapped(x))


def test_a_config_with_a_byte_order_mark_is_read(folder: Path) -> None:
    (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes())
    assert torch.equal(loaded(folder), right(folder))


def test_a_task_names_its_modules_where_the_config_does_not(folder: Path) -> None:
    """PEFT adds them when it loads."""
    _config(folder, modules_to_save=None)
    assert torch.equal(loaded(folder), right(folder))


def test_an_lm_head_may_be_a_target(tmp_path: Path) -> None:
    """PEFT then saves the head's own weights too, which are the model's."""
    kind = "an lm_head"
    config = peft.IA3Config(target_modules=["k_proj", "lm_head"], feedforward_modules=[], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model_of(kind), config).eval()
    for module in wrapped.modules():
        if hasattr(module, "ia3_l"):
            torch.nn.init.uniform_(module.ia3_l["default"], 0.5, 1.5)
    wrapped.save_pretrained(tmp_path / "a")
    assert any("lm_head.base_layer" in key for key in load_file(tmp_path / "a" / FILE))
    model = model_of(kind)
    runtime = ia3rt.patch(model)
    runtime.load_adapter(tmp_path / "a")
    base = output(model, IDS)
    with runtime.route(["a", None, "a"]):
        rows = output(model, IDS)
    theirs = output(wrapped, IDS)
    torch.testing.assert_close(rows, torch.stack([theirs[0], base[1], theirs[2]]))


# What is refused: each with its own sentence, and nothing has changed.


def _config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def _renamed(change: Change) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: {change(key): tensor for key, tensor in tensors.items()})


def _added(key: str, *shape: int) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: {**tensors, f"base_model.model.{key}": torch.ones(shape)})


def _first(change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    key = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
    return lambda folder: rewrite(folder, lambda tensors: {**tensors, key: change(tensors[key])})


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / FILE).write_bytes(change((folder / FILE).read_bytes())) and None  # type: ignore[func-returns-value]


def _pickled(what: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / FILE).unlink()
        torch.save(what, folder / "adapter_model.bin")

    return change


def _pickle_by_a_wrong_name(folder: Path) -> None:
    torch.save({"a": torch.ones(1)}, folder / FILE)


def _header(content: bytes) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    return content[:8] + b"{" * length + content[8 + length :]


K = "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        # keys
        (_renamed(lambda key: key.replace(".ia3_l", ".lora_A.weight")), "a 'lora_A' is no IA³ vector, but the config"),
        (_renamed(lambda key: key.replace(".ia3_l", ".vera_lambda_b")), "a 'vera_lambda_b' is no IA³ vector"),
        (_renamed(lambda key: key.replace(".ia3_l", ".loras.mine.lora_B")), "a 'lora_B' is no IA³ vector"),
        (
            _added("model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 32),
            "trained tokens .trainable_token_ind",
        ),
        (_added("model.layers.0.mystery", 3), "'base_model.model.model.layers.0.mystery', which is no IA³ vector"),
        (_added(f"{K}.ia3_l.mine", 32, 1), f"'base_model.model.{K}.ia3_l' and '.*{K}.ia3_l.mine', which mean the same"),
        (
            lambda folder: rewrite(
                folder,
                lambda ts: {f"{k}.{name}": t.clone() for k, t in ts.items() if "ia3" in k for name in ("x", "y")},
            ),
            r"which mean the same|several adapters, \['x', 'y'\]",
        ),
        (
            lambda folder: rewrite(
                folder,
                lambda ts: {f"{k}.{'x' if 'k_proj' in k else 'y'}" if "ia3" in k else k: t for k, t in ts.items()},
            ),
            r"holds several adapters, \['x', 'y'\], by its keys",
        ),
        (_added("model.layers.0.nothing.ia3_l", 32, 1), "the model has no module 'model.layers.0.nothing'"),
        (_added("model.norm.ia3_l", 32, 1), "'model.norm' is a LlamaRMSNorm, which wears no vector"),
        (_added("model.embed_tokens.ia3_l", 1, 32), "'model.embed_tokens' is an embedding, whose input are indices"),
        (
            _added("extra.weight", 3, 3),
            "weights for 'extra' .weight., a module that LlamaForSequenceClassification lacks",
        ),
        (_added("model.norm.weight", 32), None),  # as the model's: nothing to refuse
        # one tensor
        (_first(lambda vector: vector.flatten()), rf"at '{K}' has shape \(32,\): PEFT's linear layers have"),
        (
            _first(lambda vector: vector.reshape(2, 16, 1, 1)),
            r"shape \(2, 16, 1, 1\).*convolutions \[1, channels, 1, 1",
        ),
        (_first(lambda vector: vector[:0]), r"has shape \(0, 1\)"),
        (_first(lambda vector: vector[:16]), "expected 32 numbers. It was made for a model of another size"),
        (_first(lambda vector: vector.to(torch.int64)), "of dtype torch.int64: expected a floating point one"),
        (_first(lambda vector: vector.to(torch.complex64)), "of dtype torch.complex64: expected a floating point one"),
        (_first(lambda vector: vector.bool()), "of dtype torch.bool"),
        (_first(lambda vector: vector * float("inf")), "'bad' has a NaN or inf at"),
        # the file
        (_bytes(lambda content: b""), "it is empty, 0 bytes"),
        (_bytes(lambda content: content[:5]), "no .safetensors file"),
        (_bytes(lambda content: content[:40]), "it ends within its header: 40 of at least"),
        (_bytes(lambda content: content[:-4]), "its end is missing: [0-9,]+ of [0-9,]+ bytes"),
        (_bytes(_header), "its header is broken"),
        (_bytes(lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "a pointer of Git LFS"),
        (_bytes(lambda content: b"<!DOCTYPE html><html></html>"), "does not begin with the length of a header"),
        (_pickle_by_a_wrong_name, "it is a pickle of torch.save and no .safetensors file"),
        (_pickled([torch.ones(3)]), "holds no mapping of names to tensors, but a list"),
        (_pickled({"model": {"x": torch.ones(1)}}), "no mapping of names to tensors: 'model' is a dict"),
        (_pickled({}), "holds no vectors: none of its 0 keys"),
        # the config
        (lambda folder: (folder / CONFIG).write_text(""), "adapter_config.json is damaged: it is empty"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "it holds a list and no names with values"),
        (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe{\x00"), "adapter_config.json is damaged"),
        (lambda folder: (folder / CONFIG).write_text("{}"), "says no peft_type"),
        (lambda folder: _config(folder, peft_type="LORA"), "a PEFT adapter of type 'LORA': ia3rt runs IA3"),
        (lambda folder: _config(folder, modules_to_save="score"), "modules_to_save is 'score': expected a list"),
    ],
)
def test_each_fault_is_named(folder: Path, damage: Callable[[Path], object], message: str | None) -> None:
    model = model_of(KIND)
    runtime = ia3rt.patch(model)
    runtime.load_adapter(folder, "good")
    runtime.set_adapter("good")
    damage(folder)
    if message is None:
        runtime.load_adapter(folder, "bad")
        return
    with pytest.raises(ValueError, match=message):
        runtime.load_adapter(folder, "bad")
    assert runtime.adapters == ["good"]
    assert torch.equal(output(model, IDS), right(folder))
