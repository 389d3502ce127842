"""y = s ∘ act(gate) ∘ up, and y = s ∘ act(x): an MLP's activation, and the input site of the linear layer behind it.

s is what each row's mix is at that site (mixes.py; l_ff of IA³, Liu et al. 2022, section 3.3). It costs one multiply
here, where gate and up are read and y is written anyway; inside the GEMM behind it would cost far more (linear.py).
The activations are those of activation_tile.py.

Everything is computed in fp32 and rounded once. Rows may be any stride apart, so the two halves of one fused tensor
[M, 2N] are passed as the views that they are, in either order.
"""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ia3rt.kernels.activation_tile import activate
from ia3rt.kernels.configs import activation_config
from ia3rt.kernels.launch import run
from ia3rt.kernels.mixes import ROUTING, Routing, Site, mixed_scale, worn_by
from ia3rt.reference import Activation


@triton.jit
def _load(ptr, rows, stride, cols, inside):
    """Return a tile as fp32 [len(rows), len(cols)]; rows are int64."""
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=inside).to(tl.float32)


@triton.jit
def _store(ptr, rows, N, cols, values, inside):
    """Round a tile and store it in a contiguous [M, N]."""
    tl.store(ptr + rows[:, None] * N + cols[None, :], values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=ROUTING)
def activation_kernel(
    gate_ptr,  # [M, N], columns contiguous
    up_ptr,  # the same, or None
    y_ptr,  # [M, N], contiguous
    site,  # of width N
    stride_gate,
    stride_up,
    N,
    M,
    mix_size,
    rows_per_mix,
    mixes_ptr,
    route_ptr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute one tile of y. Programs that share columns of the bank are neighbours, so that these stay in L2."""
    routing = Routing(M, mix_size, rows_per_mix, mixes_ptr, route_ptr)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    wide_rows = rows.to(tl.int64)
    y, _ = activate(_load(gate_ptr, wide_rows, stride_gate, cols, inside), KIND)
    if up_ptr is not None:
        y *= _load(up_ptr, wide_rows, stride_up, cols, inside)
    if site.l is not None:
        y *= mixed_scale(site, worn_by(rows, routing), cols, N)
    _store(y_ptr, wide_rows, N, cols, y, inside)


@triton.jit(do_not_specialize=ROUTING)
def activation_gradient_kernel(
    dy_ptr,  # [M, N], columns contiguous
    gate_ptr,  # the same
    up_ptr,  # the same, or None
    dgate_ptr,  # [M, N], contiguous
    dup_ptr,  # the same, or None where up is
    site,  # of width N
    stride_dy,
    stride_gate,
    stride_up,
    N,
    M,
    mix_size,
    rows_per_mix,
    mixes_ptr,
    route_ptr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute one tile of dgate = s ∘ dy ∘ up ∘ act'(gate) and of dup = s ∘ dy ∘ act(gate)."""
    routing = Routing(M, mix_size, rows_per_mix, mixes_ptr, route_ptr)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    wide_rows = rows.to(tl.int64)
    act, slope = activate(_load(gate_ptr, wide_rows, stride_gate, cols, inside), KIND)
    dy = _load(dy_ptr, wide_rows, stride_dy, cols, inside)
    if up_ptr is not None:
        slope *= _load(up_ptr, wide_rows, stride_up, cols, inside)
    if site.l is not None:
        dy *= mixed_scale(site, worn_by(rows, routing), cols, N)
    if up_ptr is not None:
        _store(dup_ptr, wide_rows, N, cols, dy * act, inside)
    _store(dgate_ptr, wide_rows, N, cols, dy * slope, inside)


def _launch(
    kernel: triton.JITFunction,
    read: tuple[Tensor | None, ...],
    written: tuple[Tensor | None, ...],
    l: Tensor | None,  # noqa: E741
    mixes: Tensor,
    route: Tensor,
    kind: Activation,
) -> None:
    """Launch a kernel over tensors [M, N], which are those it reads, of any row strides, and those it writes."""
    first = next(tensor for tensor in written if tensor is not None)
    M, N = first.shape
    if M == 0:
        return
    config = activation_config(M, N, first.dtype)
    run(
        kernel,
        (triton.cdiv(M, config.block_m), triton.cdiv(N, config.block_n)),
        *read,
        *written,
        Site.of(l),
        *(0 if tensor is None else tensor.stride(0) for tensor in read),
        N,
        *Routing.of(mixes, route, M),
        KIND=kind,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        enable_fp_fusion=True,  # the default is not the same in every Triton
    )


def activation(
    gate: Tensor,
    up: Tensor | None,
    l: Tensor | None,  # noqa: E741
    mixes: Tensor,
    route: Tensor,
    kind: Activation,
    out: Tensor | None = None,
) -> Tensor:
    """Return s ∘ act(gate) ∘ up in gate.dtype, computed in fp32 and rounded once.

    Args:
        gate: [M, N], fp16, bf16 or fp32; any row stride, columns contiguous.
        up: [M, N] of gate.dtype, the same; or None where the MLP is not gated.
        l: [capacity, N], a site's slice of the bank; any row stride, columns contiguous, any of the dtypes above; or
            None for no scale.
        mixes: int32 [slots, 2 + 2K], contiguous.
        route: int32 [R], contiguous, M % R == 0.
        kind: the activation.
        out: [M, N] of gate.dtype, contiguous; made where None.

    """
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    _launch(activation_kernel, (gate, up), (y,), l, mixes, route, kind)
    return y


def activation_gradient(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    l: Tensor | None,  # noqa: E741
    mixes: Tensor,
    route: Tensor,
    kind: Activation,
    out: list[Tensor] | None = None,
) -> list[Tensor]:
    """Return [dgate], and dup behind it where there is an up: each [M, N] of gate.dtype, as y is in `activation`.

    The arguments are those of `activation`, and dy: [M, N] of gate.dtype; any row stride, columns contiguous.
    """
    count = 1 if up is None else 2
    gradients = (
        [torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(count)] if out is None else out
    )
    _launch(activation_gradient_kernel, (dy, gate, up), (*gradients, None)[:2], l, mixes, route, kind)
    return gradients
