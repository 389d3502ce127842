"""The dtypes and numbers of rows that kernels are tested with. float16 goes bfloat16's way: it is for -m slow."""

import pytest
import torch


def _slow(value: object) -> object:
    return pytest.param(value, marks=pytest.mark.slow)


DTYPES = (torch.float32, torch.bfloat16, _slow(torch.float16))
ROWS = (1, _slow(2), 7, 16, 33, _slow(64), 129)
