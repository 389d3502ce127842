"""Tuning: what is measured as faster is what the kernels then use."""

import json

import pytest
import torch

from ia3rt.bench.shapes import LLAMA_3_8B, TINY
from ia3rt.bench.tune import candidates, linear_shapes, measure_on, tune
from ia3rt.kernels import tuned
from ia3rt.kernels.configs import linear_config
from ia3rt.kernels.tuned import LinearConfig, LinearShape

CARD = "NVIDIA H100 80GB HBM3"
SHAPES = list(linear_shapes(LLAMA_3_8B, torch.bfloat16))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tuned")
    tuned.linear_configs.cache_clear()
    linear_config.cache_clear()
    yield tmp_path / "tuned"
    tuned.linear_configs.cache_clear()
    linear_config.cache_clear()


def chosen(shape: LinearShape, rows: int, card: str | None) -> LinearConfig | None:
    flags = {"per_row": shape.per_row, "scales_input": shape.scales_input, "descriptors": shape.descriptors}
    return linear_config(rows, shape.N, shape.K, torch.bfloat16, "sm_90", 132, **flags, layers=shape.layers, card=card)


def fastest(index: int):
    return lambda shape, configs: [0.5 if i == index else 1.0 for i in range(len(configs))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_first_candidate_is_the_default_and_the_second_torchs_matmul(shape):
    configs = candidates(shape, "sm_90", 132)
    default = chosen(shape, shape.rows, None)
    assert configs[: 1 + (default is not None)] == [default, None][: 1 + (default is not None)]
    assert None in configs and len(configs) == len(set(configs)) > 8


def test_what_is_faster_is_used_for_rows_up_to_those_measured(folder):
    shape = LinearShape(16, 1024, 4096, "bfloat16", True, False, True, 2)
    ((_, config, share),) = tune([shape], fastest(7), "sm_90", 132)
    assert share == 0.5 and config == candidates(shape, "sm_90", 132)[7]
    file = tuned.write_linear_configs(CARD, {shape: config})
    assert file.parent == folder and json.loads(file.read_text())["card"] == CARD
    assert chosen(shape, 16, CARD) == chosen(shape, 2, CARD) == config
    for rows, card in ((17, CARD), (1, CARD), (16, "NVIDIA A100"), (16, None)):
        assert chosen(shape, rows, card) != config


def test_torchs_matmul_is_used_where_it_is_faster():
    shape = LinearShape(4096, 1024, 4096, "bfloat16", False, False, True, 2)
    ((_, config, _),) = tune([shape], fastest(1), "sm_90", 132)
    tuned.write_linear_configs(CARD, {shape: config})
    linear_config.cache_clear()
    assert chosen(shape, 4096, CARD) is None and chosen(shape, 10_000, CARD) is None
    assert chosen(shape, 1024, CARD) is not None


def test_a_second_run_adds_to_the_first():
    first, second = SHAPES[0], SHAPES[5]
    tuned.write_linear_configs(CARD, {first: None, second: None})
    config = candidates(second, "sm_90", 132)[3]
    tuned.write_linear_configs(CARD, {second: config})
    assert tuned.linear_configs(CARD) == {first: None, second: config}


def test_less_than_noise_changes_nothing():
    def measure(shape, configs):
        return [1.0] + [0.98] * (len(configs) - 1)

    ((_, config, share),) = tune(SHAPES[:1], measure, "sm_90", 132)
    assert (config, share) == (candidates(SHAPES[0], "sm_90", 132)[0], 1.0)


def test_measuring_runs_every_candidate():
    """In the interpreter, whose times mean nothing."""
    shape = next(s for s in linear_shapes(TINY, torch.bfloat16, [16]) if not s.scales_input)
    configs = candidates(shape, "sm_80", 4)[:4]
    times = measure_on(torch.device("cpu"), rounds=1, turns=1)(shape, configs)
    assert len(times) == len(configs) and all(0 < time < 60 for time in times)
