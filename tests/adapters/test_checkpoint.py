"""PEFT's files: each side loads the other's, and nothing in a bad one is run or half loaded."""

import json
import os
import pickle
import resource
import signal

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, TARGETS, logits, peft_model, save_each, tiny_model, token_ids
from torch import nn

import ia3rt
from ia3rt.adapters.checkpoint import Checkpoint, read_checkpoint


@pytest.fixture
def folder(tmp_path):
    """A checkpoint that PEFT wrote for the tiny Llama."""
    return save_each(peft_model(tiny_model(), "llama", "b"), tmp_path)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_ia3rt_saved(family, tmp_path):
    model = tiny_model(family)
    runtime = ia3rt.patch(model)
    for saved in save_each(peft_model(model, family), tmp_path / "peft"):
        runtime.load_adapter(saved)
    runtime.add_weighted_adapter(["b", "c"], [0.5, 0.7], "sum", "linear")
    for name in ("b", "sum"):
        runtime.save_adapter(name, tmp_path / "ours" / name)
        loaded = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "ours" / name)
        runtime.set_adapter(name)
        assert torch.equal(logits(model, token_ids()), logits(loaded, token_ids()))
    config = json.loads((tmp_path / "ours" / "sum" / "adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {
        name.rpartition(".")[2] for name in TARGETS[family]["target_modules"]
    }
    assert config["feedforward_modules"] == TARGETS[family]["feedforward_modules"]


def test_a_saved_adapter_comes_back_as_it_was(folder, tmp_path):
    runtime = ia3rt.patch(tiny_model())
    runtime.load_adapter(folder)
    runtime.save_adapter("b", tmp_path / "again")
    before, after = (
        load_file(folder / "adapter_model.safetensors"),
        load_file(tmp_path / "again/adapter_model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM", "what the config said besides the sites is kept"


def test_what_cannot_be_saved_leaves_the_adapter_that_was_there(folder, tmp_path):
    runtime = ia3rt.patch(tiny_model())
    runtime.load_adapter(folder)
    runtime.save_adapter("b", tmp_path / "there")
    before = {file.name: file.read_bytes() for file in (tmp_path / "there").iterdir()}
    runtime.add_adapter("odd", config={"task_type": "CAUSAL_LM", "note": {1, 2}})
    for place in ("there", "new/deep"):
        with pytest.raises(ValueError, match=r"cannot save .*has \{1, 2\} at 'note', which JSON cannot hold"):
            runtime.save_adapter("odd", tmp_path / place)
    runtime.add_adapter("long", config={"task_type": "CAUSAL_LM", "note": "x" * 50_000})
    limits, heeded = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # the vectors have room on this disk, the config has not
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
        with pytest.raises(OSError, match=r"cannot write .*there, where nothing has changed"):
            runtime.save_adapter("long", tmp_path / "there")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, heeded)
    assert {file.name: file.read_bytes() for file in (tmp_path / "there").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_names_in_the_config_mean_the_adapters_sites_and_no_others(tmp_path):
    """Layer 1 alone, and an output site whose name ends like the input site's: PEFT compares raw endings there."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.pre_fc = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(self.pre_fc(x).relu())

    def model():
        torch.manual_seed(0)
        return nn.Sequential(Block(), Block())

    patched = model()
    runtime = ia3rt.patch(patched, target_modules=["fc", "pre_fc"], feedforward_modules=["fc"])
    runtime.add_adapter("b", {"1.fc": torch.rand(8), "1.pre_fc": torch.rand(8)})
    runtime.save_adapter("b", tmp_path)
    x = torch.randn(4, 8)
    runtime.set_adapter("b")
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path)
    assert torch.equal(patched(x), loaded(x))


def test_an_old_style_pickle_of_tensors_is_read(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    expected = read_checkpoint(folder).vectors
    (folder / "adapter_model.safetensors").unlink()
    assert all(torch.equal(vector, expected[key]) for key, vector in read_checkpoint(folder).vectors.items())


def test_the_shape_says_the_side_where_the_config_errs(folder):
    """PEFT saves such files: there the first adapter on a module fixes the side for all that come later."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "feedforward_modules": ["k_proj"]}))
    sides = {path.rpartition(".")[2]: side for path, side in read_checkpoint(folder).vectors}
    assert sides == {"k_proj": "out", "v_proj": "out", "down_proj": "in"}


def _cut_pickle(folder):
    file = folder / "adapter_model.bin"
    torch.save(load_file(folder / "adapter_model.safetensors"), file)
    (folder / "adapter_model.safetensors").unlink()
    file.write_bytes(file.read_bytes()[:-300])


def _no_names(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": 5}))


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle ran')",)


def _truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _garbage(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"these are no tensors")


def _bomb(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"weight": Bomb()}))


def _no_mapping(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save([torch.ones(3)], folder / "adapter_model.bin")


def _lora(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))


def _bad_json(folder):
    (folder / "adapter_config.json").write_text("{")


def _modules_to_save(folder):
    _rewrite(folder, lambda tensors: {**tensors, "base_model.model.score.weight": torch.ones(2, 2)})


def _odd_shape(folder):
    _rewrite(folder, lambda tensors: {key: torch.ones(2, 3) for key in tensors})


def _integers(folder):
    _rewrite(folder, lambda tensors: {key: tensor.int() for key, tensor in tensors.items()})


def _empty(folder):
    _rewrite(folder, lambda tensors: {})


def _rewrite(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def _pipe(name):
    def damage(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def _huge_config(folder):
    os.truncate(folder / "adapter_config.json", 1 << 33)


def _huge_header(folder):
    (folder / "adapter_model.safetensors").write_bytes((99_000_000).to_bytes(8, "little"))
    os.truncate(folder / "adapter_model.safetensors", 1 << 33)


def _huge_lora(folder):
    """Eight gigabytes of numbers that nobody has to read to see that they are no vector's."""
    entry = {"dtype": "F32", "shape": [2, 1 << 30], "data_offsets": [0, 1 << 33]}
    header = json.dumps({"base_model.model.model.layers.0.mlp.down_proj.ia3_l": entry}).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(folder / "adapter_model.safetensors", 8 + len(header) + (1 << 33))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_truncate, ValueError, "adapter_model.safetensors is damaged"),
        (_garbage, ValueError, "adapter_model.safetensors is damaged"),
        (_bomb, ValueError, "adapter_model.bin is damaged"),
        (_no_mapping, ValueError, "holds no mapping of names to tensors"),
        (_lora, ValueError, "of type 'LORA': ia3rt runs IA3 adapters"),
        (_pipe("adapter_config.json"), ValueError, "adapter_config.json is a pipe"),
        (_pipe("adapter_model.safetensors"), ValueError, "adapter_model.safetensors is a pipe"),
        (_huge_config, ValueError, "adapter_config.json is too large"),
        (_huge_header, ValueError, "has a header of 99,000,000 bytes"),
        (_huge_lora, ValueError, r"b/adapter_model.safetensors: the vector .*has shape \(2, 1073741824\)"),
        (_cut_pickle, ValueError, "b/adapter_model.bin is damaged"),
        (_no_names, ValueError, "beside .*b/adapter_model.safetensors: modules_to_save is '5'"),
        (_bad_json, ValueError, "adapter_config.json is damaged"),
        (_modules_to_save, ValueError, "weights for 'score' .weight., a module that LlamaForCausalLM lacks"),
        (_odd_shape, ValueError, r"at 'model.layers.0.*' has shape \(2, 3\)"),
        (_integers, ValueError, "b/adapter_model.safetensors: .*of dtype torch.int32: expected a floating point one"),
        (_empty, ValueError, "holds no vectors"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), FileNotFoundError, "holds neither"),
        (lambda folder: (folder / "adapter_config.json").unlink(), FileNotFoundError, "holds no adapter_config.json"),
    ],
)
def test_a_bad_file_is_a_clear_error_and_changes_nothing(folder, damage, error, message):
    model = tiny_model()
    runtime = ia3rt.patch(model)
    runtime.load_adapter(folder, "good")
    runtime.set_adapter("good")
    before = logits(model, token_ids())
    damage(folder)
    with pytest.raises(error, match=message):
        runtime.load_adapter(folder, "bad")
    assert runtime.adapters == ["good"]
    assert torch.equal(logits(model, token_ids()), before)


def test_a_name_that_is_neither_a_folder_nor_a_hub_id_is_a_clear_error():
    with pytest.raises(FileNotFoundError, match="'no such/folder here' is neither a folder here nor"):
        read_checkpoint("no such/folder here")


def test_a_hub_id_is_downloaded_with_what_was_asked(folder, monkeypatch):
    asked = {}

    def snapshot_download(repo, **options):
        asked.update(options, repo=repo)
        return str(folder.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    runtime = ia3rt.patch(tiny_model())
    name = runtime.load_adapter("someone/adapters", revision="v2", subfolder=folder.name, token="secret")
    assert name == folder.name
    assert asked == {
        "repo": "someone/adapters",
        "revision": "v2",
        "token": "secret",
        "allow_patterns": [
            f"{folder.name}/{file}"
            for file in (
                *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
                *("adapter.safetensors", "pytorch_adapter.bin", "model_head.safetensors", "pytorch_model_head.bin"),
            )
        ],
    }


def test_vectors_of_experts_are_refused_to_who_wears_layers_only():
    convolution = Checkpoint({("line", "out"): torch.ones(1, 5, 1)}, {})
    assert convolution.vectors_alone("a") is convolution.vectors
    experts = Checkpoint({("mlp.experts.down_proj", "in"): torch.ones(4, 1, 24)}, {})
    with pytest.raises(ValueError, match=r"adapter 'a' has a vector for each expert of 'mlp.experts.down_proj'"):
        experts.vectors_alone("a")
