"""Runs the kernels on the GPU where there is one, and otherwise in Triton's interpreter."""

import os

import pytest
import torch
from where import DEVICE

if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated: before anything imports one

    import triton_interpreter

    triton_interpreter.install()

import ia3rt.kernels.activation
import ia3rt.kernels.linear  # noqa: F401  (decorated now, so that a test may change the environment)

torch.set_num_threads(1)  # tiny tensors, and pytest-xdist gives each core a process of its own


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return DEVICE


@pytest.fixture
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute on the CPU as users do: with plain torch, not in Triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
