"""What follows the two sums over K in gate_up.py and gate_up_tma.py."""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from ia3rt.kernels.activation_tile import activate
from ia3rt.kernels.linear_tile import finish


@triton.jit
def _add_bias(acc, bias_ptr, cols, N):
    """Return acc, with the bias of its columns added where there is one."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _halves(acc):
    """Return the left and the right half of acc's columns."""
    half: tl.constexpr = acc.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(acc, [acc.shape[0], 2, half]), [0, 2, 1]))


@triton.jit
def finish_gate_up(
    gate,  # fp32 [rows, columns]
    up,  # the same, or None
    row,
    col,
    y,  # a pointer to [M, N], contiguous; or a tensor descriptor with blocks [rows, PIECE]
    biases,  # of gate and of up, [N] or None
    site,
    worn,
    M,
    N,
    KIND: tl.constexpr,
    PIECE: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
):
    """Add the biases to the parts of gate and up that begin at (row, col); activate, multiply, scale, round and store.

    This goes PIECE columns at a time, as in linear_tile.finish.
    """
    width: tl.constexpr = gate.shape[1]
    if width > PIECE:
        left, right = _halves(gate)
        up_left, up_right = None, None
        if up is not None:
            up_left, up_right = _halves(up)
        finish_gate_up(left, up_left, row, col, y, biases, site, worn, M, N, KIND, PIECE, BY_DESCRIPTOR)
        col += width // 2
        finish_gate_up(right, up_right, row, col, y, biases, site, worn, M, N, KIND, PIECE, BY_DESCRIPTOR)
    else:
        cols = col + tl.arange(0, width)
        h, _ = activate(_add_bias(gate, biases[0], cols, N), KIND)
        if up is not None:
            h *= _add_bias(up, biases[1], cols, N)
        # The rest is the end of a linear layer that has no bias.
        finish(h, row, col, y, None, site, worn, M, N, PIECE, BY_DESCRIPTOR)
