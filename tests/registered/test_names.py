"""Which names are known, by whom, and what cannot be registered."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from registering import IDS, NAMES, check, patched
from safetensors.torch import load_file, save_file
from tiny import logits, tiny_model

import ia3rt


@pytest.mark.parametrize(
    "source",
    [lambda root: {"x": root / "a", "y": str(root / "b")}, lambda root: {"x": root / "a", "y": root / "b"}.get],
)
def test_a_mapping_and_a_function_know_names(folder, truth, source):
    runtime = ia3rt.patch(tiny_model(), capacity=2, grow=False)
    runtime.register(source(folder))
    check(runtime, {**truth, "x": truth["a"], "y": truth["b"]}, ["x", None, "y", "x"])
    with pytest.raises(ValueError, match="unknown adapter 'a': load or register it first"):
        runtime.set_adapter("a")


def test_a_function_that_names_a_folder_for_any_text_leaves_mixes_alone(folder, truth):
    runtime = ia3rt.patch(tiny_model(), capacity=3, grow=False)
    runtime.register(lambda name: folder / name)
    runtime.set_adapter("a*b")
    assert runtime.active_adapters == ["a", "b"]
    runtime.set_adapter("mix:a*0.5+b*0.5")
    check(runtime, truth, ["a", None, "b", "a"])
    with pytest.raises(FileNotFoundError, match="adapter 'z' is not where the function says that was registered"):
        runtime.set_adapter("z")


def test_what_cannot_be_registered_is_refused(folder, tmp_path):
    runtime = patched(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    for source, error, message in (
        (tmp_path / "nowhere", FileNotFoundError, "is no folder"),
        (folder / "a", ValueError, "is an adapter itself"),
        (tmp_path, FileNotFoundError, "folders inside do, 'adapters/a', 'adapters/b', .*name these by a mapping"),
        (empty, FileNotFoundError, "there is no adapter to register"),
        ({"x": folder}, FileNotFoundError, "adapter 'x' is not in"),
        ({"x": folder / "a", "": folder / "a"}, ValueError, "must be a string that is not empty"),
        ({"x": folder / "a", "b": folder / "a"}, ValueError, "'b' is registered already, as"),
        (7, TypeError, "7 is no source"),
        ({"x": None}, TypeError, "adapter 'x' is to be in None, which is no path"),
        ({}, ValueError, "an empty mapping"),
    ):
        with pytest.raises(error, match=message):
            runtime.register(source)
    assert runtime.registered_adapters == list(NAMES)
    for add in (lambda: runtime.load_adapter(folder / "a"), lambda: runtime.add_adapter("a")):
        with pytest.raises(ValueError, match="an adapter named 'a' is registered: delete_adapter it first"):
            add()
    runtime.load_adapter(folder / "a", "mine")
    with pytest.raises(ValueError, match="an adapter named 'mine' is loaded already"):
        runtime.register({"mine": folder / "a"})


def test_adapters_one_folder_deeper_are_not_left_out_in_silence(folder, tmp_path):
    """As PEFT saves an adapter that was trained by a name of its own, into a folder of that name."""
    shutil.move(folder / "f", tmp_path / "f")
    shutil.move(tmp_path / "f", folder / "f" / "f")
    runtime = ia3rt.patch(tiny_model())
    told = r"one folder deeper, 'f/f': name these by a mapping, \{name: folder\}"
    with pytest.warns(UserWarning, match=told) as warned:
        assert runtime.register(folder) == list("abcde")
    assert warned[0].filename == __file__
    for name in "abcde":
        shutil.rmtree(folder / name)
    with pytest.raises(FileNotFoundError, match="; folders inside do, 'f/f': name these"):
        runtime.register(folder)
    assert runtime.register({"f": folder / "f" / "f"}) == ["f"]


def test_what_only_loaded_adapters_can_have(folder):
    file = folder / "b" / "adapter_model.safetensors"
    vectors = load_file(file)
    vectors["base_model.model.model.layers.0.mlp.up_proj.ia3_l"] = torch.ones(96, 1)
    save_file(vectors, file)
    config = json.loads((folder / "c" / "adapter_config.json").read_text())
    (folder / "c" / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    head = {"base_model.model.lm_head.weight": torch.randn(128, 64)}
    save_file(
        {**load_file(folder / "c" / "adapter_model.safetensors"), **head}, folder / "c" / "adapter_model.safetensors"
    )
    runtime = patched(folder)
    with pytest.raises(
        ValueError, match=r"'b' acts at 'model.layers.0.mlp.up_proj' \(output\), where the model has no"
    ):
        runtime.set_adapter("b")
    with pytest.raises(ValueError, match=r"'c' has its own 'lm_head'"):
        runtime.set_adapter("c")
    with pytest.raises(ValueError, match=r"acts at .*up_proj.*and the bank does not grow: name the module in"):
        runtime.load_adapter(folder / "b", "mine")
    assert runtime.adapters == []


def test_a_deleted_name_is_unknown(folder, truth):
    runtime = patched(folder)
    runtime.set_adapter("a")
    runtime.delete_adapter("b")
    with pytest.warns(UserWarning, match="'a' was active and is deleted"):
        runtime.delete_adapter("a")
    for name in "ab":
        with pytest.raises(ValueError, match=f"unknown adapter '{name}'"):
            runtime.set_adapter(name)
    assert runtime.registered_adapters == list("cdef")
    assert torch.equal(logits(runtime.model, IDS), truth[None])
