"""The bar that each kernel has to meet, and outputs that show what a kernel wrote where."""

import torch
from torch import Tensor

from ia3rt import reference

GUARD = 64


LEAST = 64
"""The fewest elements of which one can tell whether they lean towards zero."""


def assert_meets_bar(y: Tensor, in_torch: Tensor, truth: Tensor, sums: Tensor | None = None) -> None:
    """Assert that y errs about as little as torch does in the same dtype; `truth` is the same operation in float64.

    Three things have to hold. The root mean square of y's errors is at most twice torch's and half an ulp. No element
    errs more than 4 times torch's largest error, or an ulp of its own, or its entry in `sums`: a long sum in fp32 errs
    as its order has it, and torch's may be lucky. And 16-bit results do not lean towards zero, as truncated ones do.
    """
    assert y.dtype == in_torch.dtype and y.shape == truth.shape
    y, in_torch, truth = y.cpu(), in_torch.cpu(), truth.cpu()
    ulp = torch.finfo(y.dtype).eps * truth.abs()
    error, in_torch_error = y.double() - truth, in_torch.double() - truth
    allowed = (4 * in_torch_error.abs().max()).maximum(ulp)
    if sums is not None:
        allowed = allowed.maximum(sums.cpu())
    wrong = ~(error.abs() <= allowed)  # so that a NaN is wrong
    assert not wrong.any(), f"{wrong.sum()} of {y.numel()} elements; the first at {wrong.nonzero()[0].tolist()}"
    ours, most = _rms(error), 2 * _rms(in_torch_error) + _rms(ulp) / 2
    assert ours <= most, f"root mean square of the errors {ours:.3g}, torch's {_rms(in_torch_error):.3g}"
    inexact = error != 0
    if y.dtype.itemsize == 2 and inexact.sum() >= LEAST:
        nearer = (error[inexact].sign() != truth[inexact].sign()).double().mean()
        assert nearer <= 7 / 8, f"{nearer:.0%} of the elements are nearer to zero than the truth"


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def sums_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    l_in: Tensor | None,
    l_out: Tensor | None,
    mixes: Tensor,
    route: Tensor,
) -> Tensor:
    """Return what reference.linear's sums over K may err by in fp32, however ordered: √K eps Σ |s_in x| |w| |s_out|.

    The arguments are those of reference.linear; the bias is one summand more, and left out.
    """
    x = x.double() if l_in is None else reference.scale(x.double(), l_in.double(), mixes, route)
    sums = x.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps * (x.abs() @ weight.double().abs().t())
    return sums if l_out is None else reference.scale(sums, l_out.double(), mixes, route).abs()


class Guarded:
    """An output full of NaN between guards of NaN."""

    def __init__(self, M: int, N: int, dtype: torch.dtype, device: torch.device) -> None:
        self.buffer = torch.full((M * N + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
        self.out = self.buffer[GUARD:-GUARD].view(M, N)

    def assert_untouched(self) -> None:
        """Assert that nothing was written beside the output."""
        assert self.buffer[:GUARD].isnan().all() and self.buffer[-GUARD:].isnan().all()
