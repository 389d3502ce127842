"""Models over several devices: several_devices.py on the GPUs of a machine, and on devices that are made of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import devices_of_memory
import pytest
import torch

HERE = Path(__file__).resolve().parent


def passes(devices: list[str], marked: str, library: Path | None = None) -> None:
    environment = {**os.environ, "IA3RT_TEST_DEVICES": " ".join(devices), "PYTHONPATH": os.pathsep.join(sys.path)}
    if library is not None:
        environment["IA3RT_TEST_LIBRARY"] = str(library)
        environment["CUDA_VISIBLE_DEVICES"] = ""  # beside a GPU, the kernels would run on it alone
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        marked,
        HERE / "several_devices.py",
    ]
    run = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(devices_of_memory.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_devices_that_are_made_of_memory(all_of_them, tmp_path) -> None:
    library = devices_of_memory.build(tmp_path)
    if all_of_them:
        passes([*devices_of_memory.NAMES, "cpu"], "slow or not slow", library)
    else:
        passes([*devices_of_memory.NAMES], "not slow", library)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpus_and_the_cpu() -> None:
    passes([*(f"cuda:{index}" for index in range(min(2, torch.cuda.device_count()))), "cpu"], "slow or not slow")
