"""Names in a config: PEFT reads each vector at the side where it was, whatever modules are called."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from commands import done
from torch import Tensor, nn

import ia3rt
from ia3rt.adapters.checkpoint import read_checkpoint
from ia3rt.adapters.site_names import config_names, paths_of, pattern_of

PATHS = {"0": "in", "10": "out"}


def model(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 4, 3, padding=1) if kind == "convolutions" else nn.Linear(4, 4) for _ in range(11)]
    return nn.Sequential(*layers).eval()


def given(kind: str) -> Tensor:
    shape = (2, 4, 5, 5) if kind == "convolutions" else (2, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def by_hand(kind: str, vectors: dict[tuple[str, str], Tensor]) -> Tensor:
    scaled = model(kind).double()
    for (path, side), vector in vectors.items():
        layer, spatial = scaled[int(path)], [1] * (scaled[int(path)].weight.dim() - 2)
        layer.weight.data *= (
            vector.double().reshape(1, -1, *spatial) if side == "in" else vector.double().reshape(-1, 1, *spatial)
        )
        if side == "out":
            layer.bias.data *= vector.double()
    return scaled(given(kind).double())


def patched(kind: str) -> tuple[nn.Sequential, ia3rt.Runtime, dict[tuple[str, str], Tensor]]:
    generator = torch.Generator().manual_seed(2)
    vectors = {key: 1 + 0.5 * torch.randn(4, generator=generator) for key in PATHS.items()}
    plain = model(kind)
    return plain, ia3rt.patch(plain), vectors


@pytest.mark.parametrize("kind", ["convolutions", "layers"])
def test_a_whole_path_that_ends_like_anothers_stays_at_its_side(kind: str, tmp_path: Path) -> None:
    plain, runtime, vectors = patched(kind)
    right = by_hand(kind, vectors)
    runtime.add_adapter("a", vectors)
    runtime.save_adapter("a", tmp_path / "saved")
    for key, vector in vectors.items():
        runtime.add_adapter(key[0], {key: vector})
        runtime.save_adapter(key[0], tmp_path / key[0])
    done("combine", tmp_path / "0", tmp_path / "10", "-o", tmp_path / "combined")
    done("convert", tmp_path / "saved", "-o", tmp_path / "converted")
    for name in ("saved", "combined", "converted"):
        runtime.load_adapter(tmp_path / name, name)
        runtime.set_adapter(name)
        torch.testing.assert_close(plain(given(kind)).double(), right, rtol=1e-4, atol=1e-4)
        loaded = peft.PeftModel.from_pretrained(model(kind), tmp_path / name)
        torch.testing.assert_close(loaded(given(kind)).double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["convolutions", "layers"])
def test_peft_is_given_back_each_vector_at_its_side(kind: str) -> None:
    _, _, vectors = patched(kind)
    config = peft.IA3Config(target_modules=["3"], feedforward_modules=[])
    taken = peft.get_peft_model(model(kind), config)
    runtime = ia3rt.patch(taken)
    runtime.add_adapter("a", vectors)
    runtime.set_adapter("a")
    runtime.unpatch()
    torch.testing.assert_close(taken(given(kind)).double(), by_hand(kind, vectors), rtol=1e-4, atol=1e-4)


def test_names_stay_names_where_these_tell(tmp_path: Path) -> None:
    known = ["x.fc", "x.pre_fc", "y.fc", "y.pre_fc"]
    assert config_names({"x.fc": "in", "y.fc": "in"}, known) == (["fc"], ["fc"])
    assert config_names({"y.fc": "in", "y.pre_fc": "out"}, known) == (["y.fc", "y.pre_fc"], ["y.fc"])
    assert config_names({"x.fc": "in"}, None) == (["x.fc"], ["x.fc"])
    assert config_names({"fc": "out"}, ["fc", "x.fc"]) == ("fc", []), "by components the name means x.fc too"


def test_a_pattern_of_paths_is_read_without_being_run(tmp_path: Path) -> None:
    paths = ["a.b-c", "d|e", "f\\g", "h i"]
    pattern = pattern_of(paths)
    assert paths_of(pattern) == paths and all(re.fullmatch(pattern, path) for path in paths)
    for other in (r".*fc", "a.b", r"(a|b)\.fc", r"a\.b|", r"\d"):
        assert paths_of(other) is None
    plain, runtime, vectors = patched("convolutions")
    runtime.add_adapter("a", vectors)
    runtime.save_adapter("a", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["target_modules"], config["feedforward_modules"]) == (["0", "10"], "0")
    assert list(read_checkpoint(tmp_path).vectors) == [("0", "in"), ("10", "out")]
