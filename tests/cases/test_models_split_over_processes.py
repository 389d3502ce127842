"""FSDP splits a model's weights over processes: what rows wear, and what adapters learn, is one process's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What two processes found."""
    file = tmp_path_factory.mktemp("processes") / "results.json"
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*command, str(HERE / "sharded_process.py"), str(file)],
        # Where there is a GPU, both would take it for theirs and not the CPU.
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
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
