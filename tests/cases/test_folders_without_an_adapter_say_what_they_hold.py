"""A folder that holds an adapter further inside, something else, or nothing: the message says what was seen.

After transformers#28547 and peft#718: get_peft_model(…, adapter_name="mine").save_pretrained(path) writes path/mine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from heads import adapted, model_of, output, token_ids

import ia3rt
from ia3rt.adapters.checkpoint import read_checkpoint

KIND = "an lm_head"
IDS = token_ids()


@pytest.fixture
def wrapped() -> peft.PeftModel:
    return adapted(model_of(KIND), KIND, 1, "mine")


def test_an_adapter_in_a_subfolder_is_named_by_the_path_that_is_to_be_given(wrapped: Any, tmp_path: Path) -> None:
    wrapped.save_pretrained(tmp_path)
    model = model_of(KIND)
    runtime = ia3rt.patch(model)
    with pytest.raises(FileNotFoundError) as caught:
        runtime.load_adapter(tmp_path)
    given = str(caught.value).partition("Give ")[2]
    assert given == repr(str(tmp_path / "mine"))
    assert runtime.load_adapter(given.strip("'")) == "mine"
    runtime.set_adapter("mine")
    assert torch.equal(output(model, IDS), output(wrapped, IDS))


def test_several_are_all_named(wrapped: Any, tmp_path: Path) -> None:
    for name in ("one", "checkpoint-5"):
        wrapped.save_pretrained(tmp_path / name)
    with pytest.raises(
        FileNotFoundError, match="these folders inside do hold one: 'checkpoint-5/mine', 'one/mine'. Give"
    ):
        read_checkpoint(tmp_path)


def test_a_subfolder_too_much_is_said(wrapped: Any, tmp_path: Path) -> None:
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="mine/mine holds no .* itself is one: leave subfolder out"):
        read_checkpoint(tmp_path / "mine", subfolder="mine")


def test_a_file_is_not_its_folder(wrapped: Any, tmp_path: Path) -> None:
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / "mine" / "adapter_model.safetensors"
    with pytest.raises(FileNotFoundError, match=f"is a file: give the folder that holds it, '{tmp_path}/mine'"):
        read_checkpoint(file)


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    model_of(KIND).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="it is not an adapter, but a model"):
        read_checkpoint(tmp_path)


def test_weights_without_a_config_are_said(wrapped: Any, tmp_path: Path) -> None:
    wrapped.save_pretrained(tmp_path)
    (tmp_path / "mine" / "adapter_config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match="though it holds adapter_model.safetensors: .* copy the adapter_config"
    ):
        read_checkpoint(tmp_path, subfolder="mine")


def test_an_empty_folder_is_just_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no adapter_config.json: it is not an adapter$"):
        read_checkpoint(tmp_path)


def test_a_repositorys_subfolders_are_named_too(wrapped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["README.md", "mine/adapter_config.json", "mine/adapter_model.safetensors"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: files)
    with pytest.raises(FileNotFoundError, match="'mine'. Give it as the subfolder 'mine'"):
        read_checkpoint("some/one")
