"""`ia3rt inspect`: what it counts and measures, against numpy on the files' own tensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file, save_file
from tiny import peft_model, save_each, tiny_model
from torch import Tensor

from ia3rt.adapters.checkpoint import Checkpoint, read_checkpoint
from ia3rt.cli.inspection import Description, describe, find_fit, render


def saved(family: str, folder: Path) -> Path:
    return save_each(peft_model(tiny_model(family), family, "b"), folder)[0]


def text_of(description: Description, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(description, "somewhere"))
    return console.export_text()


def vectors(*sites: str, width: int = 3) -> dict[tuple[str, str], Tensor]:
    """By site, all ones; `path>` is an output site, `>path` an input site."""
    return {(site.strip(">"), "out" if site.endswith(">") else "in"): torch.ones(width, 1) for site in sites}


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        (
            "llama",
            [
                ("mlp.down_proj", "in", 96, 2),
                ("self_attn.k_proj", "out", 32, 2),
                ("self_attn.v_proj", "out", 32, 2),
            ],
        ),
        ("gpt2", [("attn.c_attn", "out", 192, 2), ("mlp.c_proj", "in", 256, 2)]),
    ],
)
def test_groups_and_statistics_are_those_of_the_file(
    family: str, groups: list[tuple[str, str, int, int]], tmp_path: Path
) -> None:
    folder = saved(family, tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    description = describe(read_checkpoint(folder))

    assert [(g.name, g.side, g.width, g.vectors) for g in description.groups] == groups
    for group in description.groups:
        module = group.name.rpartition(".")[2]
        numbers = np.concatenate([t.ravel() for key, t in tensors.items() if f".{module}." in key]).astype(np.float64)
        assert numbers.size == group.width * group.vectors
        assert group.statistics.mean_distance == pytest.approx(np.abs(numbers - 1).mean())
        assert group.statistics.max_distance == pytest.approx(np.abs(numbers - 1).max())
        assert group.statistics.negative == (numbers < 0).sum() > 0
    everything = np.concatenate([tensor.ravel() for tensor in tensors.values()]).astype(np.float64)
    assert description.vectors == len(tensors)
    assert description.numbers == everything.size
    assert description.bytes == everything.size * 4
    assert description.dtypes == ("float32",)
    assert description.statistics.mean_distance == pytest.approx(np.abs(everything - 1).mean())
    assert description.is_finite


def test_large_negative_and_broken_numbers_are_counted_apart() -> None:
    vector = torch.tensor([[1.0], [-0.5], [2.5], [3.0], [float("nan")], [float("inf")], [float("-inf")]])
    statistics = describe(Checkpoint({("layers.0.self_attn.k_proj", "out"): vector}, {})).statistics
    assert (statistics.negative, statistics.large, statistics.not_finite) == (1, 2, 3)
    assert statistics.max_distance == 2.0
    assert statistics.mean_distance == pytest.approx((0 + 1.5 + 1.5 + 2) / 4)


def test_nothing_finite_is_no_error() -> None:
    description = describe(Checkpoint({("layers.0.k_proj", "out"): torch.full((4, 1), float("nan"))}, {}))
    assert not description.is_finite
    assert description.statistics.mean_distance == 0.0


def test_layers_are_counted_as_numbers_not_as_text() -> None:
    described = describe(Checkpoint(vectors(*(f"model.layers.{i}.self_attn.k_proj>" for i in range(12))), {}))
    assert [(group.name, group.vectors) for group in described.groups] == [("self_attn.k_proj", 12)]
    assert described.fit.layers == 12


def test_names_that_two_kinds_of_layer_share_are_told_apart() -> None:
    both = vectors("encoder.block.0.layer.0.SelfAttention.k>", "decoder.block.0.layer.0.SelfAttention.k>")
    names = {group.name for group in describe(Checkpoint(both, {})).groups}
    assert names == {"encoder.block.N.layer.N.SelfAttention.k", "decoder.block.N.layer.N.SelfAttention.k"}


def test_dtypes_are_bytes(tmp_path: Path) -> None:
    half = {("layers.0.k_proj", "out"): torch.ones(8, 1, dtype=torch.bfloat16)}
    described = describe(Checkpoint({**half, ("layers.1.k_proj", "out"): torch.ones(8, 1)}, {}))
    assert described.bytes == 8 * 2 + 8 * 4
    assert described.dtypes == ("bfloat16", "float32")


@pytest.mark.parametrize(
    ("family", "sites"),
    [
        ("Llama-shaped", ["model.layers.0.self_attn.k_proj>", ">model.layers.1.mlp.down_proj"]),
        ("mixture-of-experts", ["model.layers.0.self_attn.k_proj>", ">model.layers.0.mlp.experts.3.down_proj"]),
        ("mixture-of-experts", [">model.layers.0.block_sparse_moe.experts.3.w2"]),
        ("GPT-2", ["transformer.h.0.attn.c_attn>", ">transformer.h.0.mlp.c_proj"]),
        ("GPT-NeoX", ["gpt_neox.layers.0.attention.query_key_value>", ">gpt_neox.layers.0.mlp.dense_4h_to_h"]),
        ("Falcon or Bloom", ["transformer.h.0.self_attention.query_key_value>", ">transformer.h.0.mlp.dense_4h_to_h"]),
        ("T5", ["encoder.block.0.layer.0.SelfAttention.k>", ">decoder.block.1.layer.2.DenseReluDense.wo"]),
        ("OPT", ["model.decoder.layers.0.self_attn.k_proj>", ">model.decoder.layers.0.fc2"]),
        ("OPT", ["model.decoder.layers.0.self_attn.k_proj>"]),
        ("BART", ["model.encoder.layers.0.self_attn.k_proj>", "model.decoder.layers.0.encoder_attn.v_proj>"]),
        ("Phi", ["model.layers.0.self_attn.k_proj>", ">model.layers.0.mlp.fc2"]),
        ("BERT", ["bert.encoder.layer.0.attention.self.key>", ">bert.encoder.layer.0.output.dense"]),
        ("unknown", ["model.layers.0.self_attn.k_proj>", "vision.tower.proj>"]),
        ("unknown", ["blocks.0.mixer>"]),
    ],
)
def test_family_is_told_by_the_paths(family: str, sites: list[str]) -> None:
    assert find_fit(vectors(*sites)).family.startswith(family)


def test_widths_of_the_model(tmp_path: Path) -> None:
    llama = describe(read_checkpoint(saved("llama", tmp_path / "llama"))).fit
    gpt2 = describe(read_checkpoint(saved("gpt2", tmp_path / "gpt2"))).fit
    assert (llama.layers, llama.key_value, llama.fused, llama.mlp) == (2, (32,), (), (96,))
    assert (gpt2.layers, gpt2.key_value, gpt2.fused, gpt2.mlp) == (2, (), (192,), (256,))


@pytest.mark.parametrize("width", [80, 120])
def test_what_is_printed_fits_and_says_it_all(width: int, tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "some/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    text = text_of(describe(read_checkpoint(folder)), width)
    assert max(map(len, text.splitlines())) <= width
    for part in ("somewhere", "some/base", "CAUSAL_LM", "6 vectors, 320 numbers, 1,280 bytes, float32"):
        assert part in text
    assert "2 layers with vectors, k/v width 32, MLP width 96" in text
    assert "self_attn.k_proj" in text
    assert "NaN/inf" not in text


def test_broken_numbers_get_a_column(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, :1] = np.nan
    save_file(tensors, file)
    description = describe(read_checkpoint(folder))
    assert description.statistics.not_finite == 1
    assert "NaN/inf" in text_of(description)
