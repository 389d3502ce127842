"""Files that name single experts, as an earlier transformers did, combined beside the model that has one tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import done, fails, run
from mixtures import tiny_mixture
from safetensors.torch import save_file
from torch import Tensor

import ia3rt

OLD, NEW = "model.layers.0.block_sparse_moe.experts", "model.layers.0.mlp.experts"


def saved(folder: Path, vectors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    keys = {f"base_model.model.{path}.ia3_l": each for path, each in vectors.items()}
    save_file(keys, folder / "adapter_model.safetensors")
    config = dict(peft_type="IA3", target_modules=["w1", "w2", "w3"], feedforward_modules=["w2"])
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def single(folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w1": (24, 1), "w2": (1, 24), "w3": (24, 1)}
    vectors = {
        f"{OLD}.{expert}.{name}": 1 + 0.3 * torch.randn(shape, generator=generator)
        for expert in range(4)
        for name, shape in shapes.items()
    }
    return saved(folder, vectors)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [single(tmp_path / name, seed) for seed, name in enumerate("ab")]


@pytest.mark.parametrize(
    ("kind", "weights", "density"),
    [
        ("product", None, None),
        ("linear", [0.7, 0.4], None),
        ("delta", None, None),
        ("max_abs", None, None),
        ("ties", None, 1.0),
    ],
)
def test_what_goes_number_by_number_is_as_in_the_model(
    kind: str, weights: list[float] | None, density: float | None, folders: list[Path], tmp_path: Path
) -> None:
    options = ["--weights", ",".join(map(str, weights))] if weights else []
    options += ["--density", str(density)] if density else []
    done("combine", *folders, "-o", tmp_path / "new", "--type", kind, *options)
    runtime = ia3rt.patch(tiny_mixture(num_hidden_layers=1))
    for folder in (*folders, tmp_path / "new"):
        runtime.load_adapter(folder, folder.name)
    runtime.add_weighted_adapter(["a", "b"], weights, "right", kind, density=density)
    made, right = (runtime.get_adapter(name).vectors for name in ("new", "right"))
    assert made.keys() == right.keys() and all(torch.equal(made[key], right[key]) for key in right)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ties", []),
        ("magnitude_prune", ["--density", "0.3"]),
        ("dare_linear", ["--density", "0.5"]),
        ("dare_ties", ["--density", "0.5"]),
        ("slerp", ["--weights", "0.3,0.7"]),
    ],
)
def test_what_takes_a_site_as_a_whole_needs_the_model(
    kind: str, options: list[str], folders: list[Path], tmp_path: Path
) -> None:
    result = run("combine", *folders, "-o", tmp_path / "new", "--type", kind, *options)
    fails(result, 1, f"{kind} of {folders[0]} and {folders[1]}", f"single experts ('{OLD}.0.w1')", "ia3rt.patch(model)")
    assert not (tmp_path / "new").exists()


def test_files_by_earlier_and_by_todays_names_need_the_model(folders: list[Path], tmp_path: Path) -> None:
    today = saved(tmp_path / "today", {f"{NEW}.down_proj": torch.rand(4, 1, 24)})
    for order in ([folders[0], today], [today, folders[0]]):
        result = run("combine", *order, "-o", tmp_path / "new")
        fails(result, 1, f"adapter '{folders[0]}' has vectors of single", f"adapter '{today}' has one of all of them")
    for each in (folders[0], today):
        done("combine", each, "-o", tmp_path / f"one of {each.name}", "--type", "negate")
