"""Tuning: what is measured as faster is what the kernels then use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from where import DEVICE

from ia3rt.bench.shapes import LLAMA_3_8B, SHAPES, TINY
from ia3rt.bench.tuning import ahead
from ia3rt.bench.tuning.registry import OPERATIONS
from ia3rt.bench.tuning.search import measure_on, tune
from ia3rt.kernels import tuned
from ia3rt.kernels.attention_configs import attention_config
from ia3rt.kernels.configs import gate_up_config, linear_config
from ia3rt.kernels.quantised_configs import linear_quantised_config
from ia3rt.kernels.tuned import ROWS, AttentionShape, GateUpShape, LinearShape, QuantisedShape

CARD = "NVIDIA H100 80GB HBM3"
SHIPPED = tuned.FOLDER
PROBLEMS = [
    (name, shape)
    for name, operation in OPERATIONS.items()
    for shape in operation.shapes(LLAMA_3_8B, torch.bfloat16, ROWS)
]
CACHED = linear_config, gate_up_config, linear_quantised_config, tuned.tuned_configs


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tuned")
    forget()
    yield tmp_path / "tuned"
    forget()


def forget() -> None:
    for function in CACHED:
        function.cache_clear()


def chosen(name: str, shape, card: str | None, **changes: int):
    """What the launcher of an operation launches."""
    shape = shape._replace(**changes)
    dtype, common = getattr(torch, shape.dtype), {"card": card}
    if name == "linear":
        flags = {key: value for key, value in shape._asdict().items() if key not in ("rows", "N", "K", "dtype")}
        return linear_config(*shape[:3], dtype, "sm_90", 132, **flags, **common)
    if name == "gate_up":
        flags = {"gated": shape.gated, "per_row": shape.per_row, "descriptors": shape.descriptors, "two_mixes": False}
        return gate_up_config(*shape[:3], dtype, "sm_90", 132, **flags, **common)
    if name == "linear_quantised":
        sizes = shape[:3], (shape.kind, shape.group_size)
        return linear_quantised_config(*sizes[0], dtype, "sm_90", 132, *sizes[1], per_row=shape.per_row, **common)
    flags = {"heads": shape.heads, "masked": False, "plain": True}
    return attention_config(shape.rows, shape.D, dtype, "sm_90", 132, **flags, **common)


def fastest(index: int):
    return lambda operation, shape, configs: [0.5 if i == index else 1.0 for i in range(len(configs))]


def best_of(name: str, shape, index: int):
    ((_, config, share),) = tune(OPERATIONS[name], [shape], fastest(index), "sm_90", 132)
    return config, share


@pytest.mark.parametrize(("name", "shape"), PROBLEMS, ids=str)
def test_the_first_candidate_is_the_default_and_torchs_way_is_another(name, shape):
    configs = OPERATIONS[name].candidates(shape, "sm_90", 132)
    assert configs[0] == chosen(name, shape, None) and len(configs) == len(set(configs))
    assert (None in configs) is (name != "attention")
    assert len(configs) > 8 or (name == "linear_quantised" and shape.rows > 64)  # torch's way, and no blocks
    assert shape.rows in ROWS and isinstance(shape, tuned.SHAPES[name][0])


SOME = [
    ("linear", LinearShape(16, 1024, 4096, "bfloat16", True, False, True, 2)),
    ("gate_up", GateUpShape(16, 14336, 4096, "bfloat16", True, True, True)),
    ("linear_quantised", QuantisedShape(16, 4096, 4096, "bfloat16", "int4", 128, True)),
    ("attention", AttentionShape(1024, 32, 128, "bfloat16")),
]


@pytest.mark.parametrize(("name", "shape"), SOME, ids=str)
def test_what_is_faster_is_used_for_rows_up_to_those_measured(name, shape, folder):
    config, share = best_of(name, shape, 7)
    assert share == 0.5 and config == OPERATIONS[name].candidates(shape, "sm_90", 132)[7]
    file = tuned.write_configs(CARD, {name: {shape: config}})
    assert file.parent == folder and json.loads(file.read_text())["card"] == CARD
    forget()
    before = ROWS[ROWS.index(shape.rows) - 1]
    assert chosen(name, shape, CARD) == chosen(name, shape, CARD, rows=before + 1) == config
    for rows, card in ((shape.rows + 1, CARD), (before, CARD), (shape.rows, "NVIDIA A100"), (shape.rows, None)):
        assert chosen(name, shape, card, rows=rows) != config


@pytest.mark.parametrize(("name", "shape"), SOME[:3], ids=str)
def test_torchs_way_is_used_where_it_is_faster(name, shape):
    shape = shape._replace(rows=4096 if name == "linear" else 16, per_row=False)
    config, _ = best_of(name, shape, 1)
    tuned.write_configs(CARD, {name: {shape: config}})
    forget()
    assert chosen(name, shape, CARD) is None and chosen(name, shape, None) is not None


def test_a_tuned_gate_up_leaves_registers_for_a_second_mix():
    shape = GateUpShape(4096, 14336, 4096, "bfloat16", True, False, True)
    config, _ = best_of("gate_up", shape, 2)
    tuned.write_configs(CARD, {"gate_up": {shape: config}})
    forget()
    flags = {"gated": True, "per_row": False, "descriptors": True, "card": CARD}
    one, two = (gate_up_config(*shape[:3], torch.bfloat16, "sm_90", 132, two_mixes=two, **flags) for two in (0, 1))
    assert one == config and two.piece == 32 < one.piece


def test_a_second_run_adds_to_the_first_and_operations_stand_side_by_side():
    (_, first), (_, second) = PROBLEMS[0], PROBLEMS[5]
    tuned.write_configs(CARD, {"linear": {first: None, second: None}})
    config = OPERATIONS["linear"].candidates(second, "sm_90", 132)[3]
    name, other = SOME[3]
    wide = OPERATIONS[name].candidates(other, "sm_90", 132)[3]
    tuned.write_configs(CARD, {"linear": {second: config}, name: {other: wide}})
    assert tuned.linear_configs(CARD) == {first: None, second: config}
    assert tuned.tuned_configs(CARD, name) == {other: wide} and tuned.tuned_configs(CARD, "gate_up") == {}


def test_the_shipped_file_which_has_linear_layers_alone_is_read(monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", SHIPPED)
    forget()
    assert list(json.loads(tuned.file_of(CARD).read_text())) == ["card", "linear"]
    assert len(tuned.linear_configs(CARD)) == 21 and tuned.tuned_configs(CARD, "attention") == {}
    shape = LinearShape(512, 1024, 4096, "bfloat16", False, False, True, 2)
    assert chosen("linear", shape, CARD).resident == 2 and chosen("linear", shape, None).resident == 1


def test_less_than_noise_changes_nothing():
    def measure(operation, shape, configs):
        return [1.0] + [0.98] * (len(configs) - 1)

    name, shape = SOME[0]
    ((_, config, share),) = tune(OPERATIONS[name], [shape], measure, "sm_90", 132)
    assert (config, share) == (chosen(name, shape, None), 1.0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_measuring_runs_every_candidate(name):
    """Without a GPU in the interpreter, whose times mean nothing."""
    rows = [16] if name != "attention" else [128]
    shapes = SHAPES["smollm2-135m"] if name == "linear_quantised" else TINY
    shape = next(iter(OPERATIONS[name].shapes(shapes, torch.bfloat16, rows)))
    configs = OPERATIONS[name].candidates(shape, "sm_80", 4)[:3]
    times = measure_on(DEVICE, rounds=1, turns=1)(OPERATIONS[name], shape, configs)
    assert len(times) == len(configs) and all(0 < time < 60 for time in times)


def test_what_shares_its_code_is_built_once():
    work = ahead.tasks(PROBLEMS, "sm_90", 132)
    launches = sum(len(OPERATIONS[name].candidates(shape, "sm_90", 132)) for name, shape in PROBLEMS)
    assert {name for name, *_ in work} == set(OPERATIONS) and len(work) < launches / 3
    linear = [(shape, config) for name, shape, config in work if name == "linear" and not config.resident]
    assert {config.splits > 1 for _, config in linear} == {True, False}


BUILD = """
import sys
from ia3rt.bench.shapes import TINY
from ia3rt.bench.tuning import ahead
from ia3rt.bench.tuning.registry import OPERATIONS
import torch

if __name__ == "__main__":
    shapes = [(name, shape) for name in OPERATIONS for shape in OPERATIONS[name].shapes(TINY, torch.bfloat16, [128])]
    work = {task[0]: task for task in ahead.tasks(shapes, "sm_90", 132)}
    print(len(work), *ahead.build(list(work.values()), "sm_90", 132, workers=2))
    assert "torch.cuda" not in sys.modules or not torch.cuda.is_initialized()
"""


@pytest.mark.slow
def test_workers_build_into_the_cache_without_a_gpu(tmp_path):
    """And a second time find it there."""
    script, cache = tmp_path / "build.py", tmp_path / "cache"
    script.write_text(BUILD)
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def built() -> set[Path]:
        done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert set(done.stdout.split()[1:]) == {"None"}, done.stdout
        return set(cache.rglob("*.cubin"))

    first = built()
    assert len(first) >= 3 and built() == first
