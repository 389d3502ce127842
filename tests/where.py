"""Where tests run: what the kernels compute on the GPU where there is one, and otherwise in Triton's interpreter."""

import pytest
import torch

CPU = torch.device("cpu")
DEVICE = torch.device("cuda") if torch.cuda.is_available() else CPU
"""Where the kernels run; the fixture `device` is it."""

TRITON = "triton" if DEVICE.type == "cuda" else pytest.param("triton", marks=pytest.mark.slow)
"""The backend, of a test of what no kernel has a part in, and which takes long in the interpreter."""


def home(backend: str | None) -> torch.device:
    """Return where a test's model stands: where its backend's users have it. On a GPU machine torch keeps its CPU."""
    return DEVICE if backend == "triton" else CPU
