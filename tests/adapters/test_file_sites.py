"""Adapters combined without a model: experts and convolutions are known by the shapes in their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from ia3rt.adapters.checkpoint import Checkpoint, read_checkpoint
from ia3rt.adapters.file_sites import file_sites
from ia3rt.cli.main import app

EXPERTS, LAYER = "model.layers.0.mlp.experts.down_proj", "model.layers.0.self_attn.k_proj"


def saved(folder: Path, feedforward: list[str], **vectors: Tensor) -> Path:
    """A PEFT checkpoint with these vectors at `path`, its dots written as double underscores."""
    folder.mkdir()
    paths = {path.replace("__", "."): vector for path, vector in vectors.items()}
    save_file(
        {f"base_model.model.{path}.ia3_l": vector for path, vector in paths.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "IA3", "target_modules": [*paths], "feedforward_modules": feedforward}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def combined(tmp_path: Path, *folders: Path) -> dict[tuple[str, str], Tensor]:
    output = tmp_path / "new"
    arguments = ["combine", *map(str, folders), "-o", str(output), "--type", "max_abs"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return read_checkpoint(output).vectors


@pytest.mark.parametrize("order", [1, -1])
def test_experts_with_a_vector_each_and_with_one_for_all(order: int, tmp_path: Path) -> None:
    each, one = 1 + torch.rand(3, 1, 5), 1 - torch.rand(1, 5)
    path = EXPERTS.replace(".", "__")
    folders = [saved(tmp_path / "each", [EXPERTS], **{path: each}), saved(tmp_path / "one", [EXPERTS], **{path: one})]
    (made,) = combined(tmp_path, *folders[::order]).values()
    strongest = torch.where((each - 1).abs() > (one - 1).abs(), each, one.expand(3, 1, 5))
    torch.testing.assert_close(made, strongest)


def test_experts_that_share_vectors_go_on_sharing(tmp_path: Path) -> None:
    path = EXPERTS.replace(".", "__")
    folders = [saved(tmp_path / name, [EXPERTS], **{path: torch.rand(1, 5)}) for name in "ab"]
    (made,) = combined(tmp_path, *folders).values()
    assert made.shape == (1, 5)


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_convolutions_keep_their_shape_and_side(spatial: int, tmp_path: Path) -> None:
    first, second = (torch.rand(1, 6, *(1,) * spatial) for _ in "ab")
    folders = [
        saved(tmp_path / "a", ["down.conv2"], down__conv1=first, down__conv2=second),
        saved(tmp_path / "b", [], down__conv1=torch.ones_like(first)),
    ]
    assert {key: vector.tolist() for key, vector in combined(tmp_path, *folders).items()} == {
        ("down.conv1", "out"): first.tolist(),
        ("down.conv2", "in"): second.tolist(),
    }


@pytest.mark.parametrize(
    ("path", "one", "other"),
    [
        (LAYER, (8, 1), (4, 1)),
        (EXPERTS, (3, 8, 1), (2, 8, 1)),
        (EXPERTS, (3, 8, 1), (24, 1)),
        (LAYER, (1, 8, 1, 1), (1, 8, 1)),
    ],
)
def test_what_is_of_two_models_is_told_by_its_shapes(path: str, one: tuple[int, ...], other: tuple[int, ...]) -> None:
    checkpoints = {
        name: Checkpoint({(path, "out"): torch.ones(shape)}, {}) for name, shape in (("a", one), ("b", other))
    }
    with pytest.raises(ValueError, match=f"adapters 'a' and 'b' are of different models: at '{path}' .output. one has"):
        file_sites(checkpoints)
