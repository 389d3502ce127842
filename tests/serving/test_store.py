"""The store of adapters by content."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from ia3rt.adapters.checkpoint import read_checkpoint
from ia3rt.serving.vllm.store import store


def write(folder, value: float, **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"base_model.model.fc.ia3_l": torch.full((1, 4), value)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", **config}))
    return folder


def test_the_same_content_is_stored_once(tmp_path) -> None:
    root = tmp_path / "store"
    first, second = write(tmp_path / "a", 2.0), write(tmp_path / "b", 2.0)
    stored = store(first, root)
    assert store(second, root) == stored and stored.parent == root
    assert store(write(first, 3.0), root) != stored
    assert {child.name[0] != "." for child in root.iterdir()} == {True} and len(list(root.iterdir())) == 2
    assert read_checkpoint(stored).vectors["fc", "in"].flatten().tolist() == [2.0] * 4
    assert store(stored, root) == stored


def test_what_is_stored_outlives_its_source(tmp_path) -> None:
    source = write(tmp_path / "a", 2.0)
    stored = store(source, tmp_path / "store")
    write(source, 5.0)
    assert read_checkpoint(stored).vectors["fc", "in"].flatten().tolist() == [2.0] * 4


def test_a_damaged_adapter_is_not_stored(tmp_path) -> None:
    source = write(tmp_path / "a", 2.0)
    (source / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="damaged"):
        store(source, tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []
    with pytest.raises(ValueError, match="LORA"):
        store(write(tmp_path / "b", 2.0, peft_type="LORA"), tmp_path / "store")


def test_many_at_once(tmp_path) -> None:
    source = write(tmp_path / "a", 2.0)
    with ThreadPoolExecutor(8) as pool:
        stored = set(pool.map(lambda _: store(source, tmp_path / "store"), range(32)))
    assert len(stored) == 1 and [child.name[0] for child in (tmp_path / "store").iterdir()] != ["."]
    assert len(list((tmp_path / "store").iterdir())) == 1
