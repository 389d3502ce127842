"""h = s ∘ act(W_gate x + b_gate) ∘ (W_up x + b_up): the first half of a gated MLP, from one reading of x.

s is what each row's mix is at the input site of the linear layer behind it (mixes.py; l_ff of IA³, Liu et al. 2022,
section 3.3). Both sums share each tile of x, and what leaves the kernel is h: gate and up, twice as large, are neither
written nor read again. Without up it is s ∘ act(W x + b), of an MLP that is not gated. The activations are those of
activation_tile.py.

Many rows go to gate_up_tma.py where the device has descriptors. No sum is shared by several programs (split-K): the
activation needs all of it, and an MLP is so wide that narrow tiles reach every processor.

Everything behind the sums is computed in fp32 and rounded once: gate and up are not rounded to the dtype of x.
"""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ia3rt.kernels.activation import activation
from ia3rt.kernels.configs import arch_of, card_of, gate_up_config, processors_of
from ia3rt.kernels.gate_up_tile import finish_gate_up
from ia3rt.kernels.gate_up_tma import fits_descriptors, gate_up_tma
from ia3rt.kernels.launch import precision_of, run
from ia3rt.kernels.linear_tile import add_part, tile_of
from ia3rt.kernels.mixes import ROUTING, TALLEST, Routing, Site, worn_by_tile
from ia3rt.kernels.tuned import LinearConfig
from ia3rt.reference import Activation


@triton.jit(do_not_specialize=ROUTING)
def gate_up_kernel(
    x_ptr,  # [M, K], columns contiguous
    gate_ptr,  # [N, K], any strides
    up_ptr,  # [N, K], strided as gate is; or None
    biases,  # of gate and of up, [N] or None
    y_ptr,  # [M, N], contiguous
    site,  # of width N
    stride_wn,
    stride_wk,
    stride_x,
    K,
    N,
    M,
    mix_size,
    rows_per_mix,
    mixes_ptr,
    route_ptr,
    TWO_MIXES: tl.constexpr,  # whether a tile wears two mixes at most
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Compute one tile of y."""
    row, col = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    # Rows and columns past the end wrap around: they are computed from real data and never stored, and the loop over K
    # needs no mask for them. Offsets are 64-bit, as x and W may have more than 2**31 elements.
    rows = ((row + tl.arange(0, BLOCK_M)) % M).to(tl.int64)[:, None]
    cols = ((col + tl.arange(0, BLOCK_N)) % N).to(tl.int64)[None, :]
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows * stride_x + ks[None, :]
    w_offsets = cols * stride_wn + ks.to(tl.int64)[:, None] * stride_wk
    gate_ptrs = gate_ptr + w_offsets
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = None
    if up_ptr is not None:
        up_ptrs = up_ptr + w_offsets
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    IN_PARTS: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    if IN_PARTS:
        gate_part = gate
        if up_ptr is not None:
            up_part = up
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs, mask=(ks < K - k)[None, :], other=0.0)
        w_gate = tl.load(gate_ptrs, mask=(ks < K - k)[:, None], other=0.0)
        if IN_PARTS:
            gate_part = tl.dot(x, w_gate, gate_part, input_precision=PRECISION)
            gate, gate_part = add_part(gate, gate_part, k + BLOCK_K, K)
        else:
            gate = tl.dot(x, w_gate, gate, input_precision=PRECISION)
        if up_ptr is not None:
            w_up = tl.load(up_ptrs, mask=(ks < K - k)[:, None], other=0.0)
            if IN_PARTS:
                up_part = tl.dot(x, w_up, up_part, input_precision=PRECISION)
                up, up_part = add_part(up, up_part, k + BLOCK_K, K)
            else:
                up = tl.dot(x, w_up, up, input_precision=PRECISION)
            up_ptrs += BLOCK_K * stride_wk
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K * stride_wk
    if IN_PARTS:
        gate += gate_part
        if up is not None:
            up += up_part
    worn = worn_by_tile(row, Routing(M, mix_size, rows_per_mix, mixes_ptr, route_ptr), BLOCK_M, TWO_MIXES)
    finish_gate_up(gate, up, row, col, y_ptr, biases, site, worn, M, N, KIND, PIECE, BY_DESCRIPTOR=False)


def gate_up(
    x: Tensor,
    gate: Tensor,
    bias_gate: Tensor | None,
    up: Tensor | None,
    bias_up: Tensor | None,
    l: Tensor | None,  # noqa: E741
    mixes: Tensor,
    route: Tensor,
    kind: Activation,
    out: Tensor | None = None,
    config: LinearConfig | None = None,
) -> Tensor:
    """Return s ∘ act(W_gate x + b_gate) ∘ (W_up x + b_up) in x.dtype. Weights of other strides take three launches.

    Args:
        x: [M, K], fp16, bf16 or fp32; any row stride, columns contiguous.
        gate: [N, K] of x.dtype, any strides.
        bias_gate: [N], contiguous, or None.
        up: as gate, and of its strides: two tensors, or the halves of one; or None where the MLP is not gated.
        bias_up: as bias_gate.
        l: [capacity, N], a site's slice of the bank; any row stride, columns contiguous; or None for no scale.
        mixes: int32 [slots, 2 + 2K], contiguous.
        route: int32 [R], contiguous, M % R == 0.
        kind: the activation.
        out: [M, N] of x.dtype, contiguous; made where None.
        config: block sizes; chosen by shape and device where None.

    """
    y = x.new_empty((x.shape[0], gate.shape[0])) if out is None else out
    if x.shape[0] == 0:
        return y
    routing = Routing.of(mixes, route, x.shape[0])
    config = config or plan(x, gate, up, y, routing)
    biases = bias_gate, bias_up
    if config is None:
        gated = torch.nn.functional.linear(x, gate, bias_gate)
        multiplied = None if up is None else torch.nn.functional.linear(x, up, bias_up)
        activation(gated, multiplied, l, mixes, route, kind, out=y)
    elif config.resident:
        gate_up_tma(x, gate, up, biases, Site.of(l), y, routing, kind, config, processors_of(x.device))
    else:
        _launch_pointers(x, gate, up, biases, Site.of(l), y, routing, kind, config)
    return y


def plan(x: Tensor, gate: Tensor, up: Tensor | None, y: Tensor, routing: Routing) -> LinearConfig | None:
    """Return the config of a launch; None where torch multiplies."""
    if up is not None and up.stride() != gate.stride():
        return None
    config: LinearConfig | None = gate_up_config(
        x.shape[0],
        *gate.shape,
        x.dtype,
        arch_of(x.device),
        processors_of(x.device),
        gated=up is not None,
        per_row=routing.per_row,
        two_mixes=routing.two_mixes(TALLEST),
        descriptors=fits_descriptors(x, gate, up, y),
        card=card_of(x.device),
    )
    return config


def _launch_pointers(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None],
    site: Site,
    y: Tensor,
    routing: Routing,
    kind: Activation,
    config: LinearConfig,
) -> None:
    """Run gate_up_kernel, a program a tile."""
    (M, K), N = x.shape, gate.shape[0]
    run(
        gate_up_kernel,
        (config.tiles(M, N),),
        x,
        gate,
        up,
        biases,
        y,
        site,
        *gate.stride(),
        x.stride(0),
        K,
        N,
        *routing,
        TWO_MIXES=routing.two_mixes(config.block_m),
        KIND=kind,
        PRECISION=precision_of(x.dtype),
        **config.build_options(),
    )
