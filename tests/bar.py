"""The bar that each kernel has to meet, and outputs that show what a kernel wrote where."""

import torch
from torch import Tensor

GUARD = 64


def assert_meets_bar(y: Tensor, in_torch: Tensor, truth: Tensor, times: int = 2) -> None:
    """Assert that y errs at most twice (or `times`) as much as torch does in the same dtype, and one ulp.

    `truth` is the same operation in float64. Torch's error is its largest one; the ulp is each element's own.
    """
    assert y.dtype == in_torch.dtype and y.shape == truth.shape
    y, in_torch, truth = y.cpu(), in_torch.cpu(), truth.cpu()
    ulp = torch.finfo(y.dtype).eps * truth.abs()
    allowed = times * (in_torch.double() - truth).abs().max() + ulp
    error = (y.double() - truth).abs()
    wrong = ~(error <= allowed)  # so that a NaN is wrong
    assert not wrong.any(), f"{wrong.sum()} of {y.numel()} elements; the first at {wrong.nonzero()[0].tolist()}"


class Guarded:
    """An output full of NaN between guards of NaN."""

    def __init__(self, M: int, N: int, dtype: torch.dtype, device: torch.device) -> None:
        self.buffer = torch.full((M * N + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
        self.out = self.buffer[GUARD:-GUARD].view(M, N)

    def assert_untouched(self) -> None:
        """Assert that nothing was written beside the output."""
        assert self.buffer[:GUARD].isnan().all() and self.buffer[-GUARD:].isnan().all()
