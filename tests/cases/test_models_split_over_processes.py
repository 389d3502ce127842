"""FSDP splits a model's weights over processes: what rows wear, and what adapters learn, is one process's."""

from __future__ import annotations

import json

import pytest
from two_processes import run_in_two


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What two processes found."""
    file = tmp_path_factory.mktemp("processes") / "results.json"
    run_in_two("sharded_process.py", file)
    return json.loads(file.read_text("utf-8"))


@pytest.mark.parametrize("order", ["sharded first", "patched first"])
@pytest.mark.parametrize("made", ["tiny_model", "tiny_mixture"])
def test_a_model_that_fsdp_splits_wears_and_learns_what_one_process_does(results, made, order):
    worn, learned = results[f"{made}, {order}"]
    assert worn < 1e-5
    assert learned < 1e-4


def test_what_is_not_supported_is_said(results):
    trained, merged, headed, added, experts = results["refusals"]
    assert "adapter 'a' is trained, and its vector at" in trained and "fully_shard()" in trained
    assert "cannot merge into 'model.layers.0.self_attn.k_proj': its weight is split over processes" in merged
    assert "adapter 'headed' has its own ['lm_head'], whose gradients FSDP" in headed
    assert "own module 'lm_head' cannot be one like the model's, whose 'weight' is split over processes" in added
    assert "'model.layers.0.mlp.experts.down_proj' wears no vector: MixtralExperts is tensor-parallel" in experts


def test_fsdp1_around_the_whole_model_in_training_learns_what_one_process_does(results):
    differs, said = results["fsdp1"]
    assert differs < 1e-5
    assert "adapter 'a' is trained, and FullyShardedDataParallel has split its vector at" in said
