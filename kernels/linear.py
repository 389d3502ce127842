"""y = s_out ∘ (W (s_in ∘ x) + b): a linear layer with an input and an output site (IA³, Liu et al. 2022, section 3.3).

s_in and s_out are what each row's mix is at the two sites (mixes.py); either may be absent. The output scale costs one
multiply in the epilogue. The input scale has a pass of its own before: inside, it would force x through registers and
make every wgmma wait, and for a few rows too each step along K waited for the bank: on an H100 that took 7 times as
long as the pass and torch's matmul.

Many rows go to linear_tma.py where the device has descriptors. Up to 64 rows, several programs share the sum of a tile
(split-K) where else there were fewer tiles than processors: each writes its part to a workspace, and sum_kernel adds
them in their order, so that results repeat to the bit, as with atomics they would not. Swapped operands, W x^T, are
the other way: then wgmma serves few rows. Built for sm_90 at 16 rows their loop is no shorter (7.6 instructions a warp
for each KiB of W, against 7.2; the time to read it leaves room for ten times as many), and their tiles have at least 64
columns of y, so that half as many programs read W.

s_in ∘ x is rounded to the dtype of x, for the tensor cores; the rest is accumulated, biased and scaled in fp32 and
rounded once.
"""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ia3rt.kernels.configs import processors_of
from ia3rt.kernels.launch import precision_of, run
from ia3rt.kernels.linear_plan import plan
from ia3rt.kernels.linear_sum import add_partials
from ia3rt.kernels.linear_tile import Layer, add_part, finish, of_layers, tile_of
from ia3rt.kernels.linear_tma import linear_tma
from ia3rt.kernels.mixes import ROUTING, Routing, Site, worn_by_tile
from ia3rt.kernels.scale import scale
from ia3rt.kernels.tuned import LinearConfig


@triton.jit(do_not_specialize=ROUTING)
def linear_kernel(
    x_ptr,  # [M, K], columns contiguous
    stride_wn,
    stride_wk,
    weight_a,  # [N, K], any strides
    epilogue_a,
    y_a,  # [M, N], contiguous; where SPLIT fp32 [programs along axis 1, M, N]
    weight_b,  # and those of the second layer, which is like the first; None where there is one
    epilogue_b,
    y_b,
    stride_l_out,
    stride_x,
    K,
    N,
    M,
    mix_size,
    rows_per_mix,
    mixes_ptr,
    route_ptr,
    TWO_MIXES: tl.constexpr,  # whether a tile wears two mixes at most
    SPLIT: tl.constexpr,  # whether the programs along axis 1 share a sum
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Compute one tile of y_a or of y_b; or a share of its sum.

    Pointers are chosen, not code: in two branches, each would have its own buffers in shared memory.
    """
    tile = tl.program_id(0)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    if weight_b is not None:  # noqa: SIM102  (this is known when the kernel is compiled, and what follows is not)
        if tile >= tiles:
            tile -= tiles
            weight_a, epilogue_a, y_a = weight_b, epilogue_b, y_b
    row, col = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    begin, end = 0, K
    if SPLIT:
        share = tl.cdiv(tl.cdiv(K, BLOCK_K), tl.num_programs(1)) * BLOCK_K
        begin = tl.program_id(1) * share
        end = min(K, begin + share)

    # Rows and columns past the end wrap around: they are computed from real data and never stored, and the loop over K
    # needs no mask for them. Offsets are 64-bit, as x and W may have more than 2**31 elements.
    ks = begin + tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (rows % M).to(tl.int64)[:, None] * stride_x + ks[None, :]
    w_ptrs = weight_a + (cols % N).to(tl.int64)[None, :] * stride_wn + ks.to(tl.int64)[:, None] * stride_wk
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    IN_PARTS: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    if IN_PARTS:
        part = acc
    for k in range(begin, end, BLOCK_K):
        ks = tl.arange(0, BLOCK_K)
        x = tl.load(x_ptrs, mask=(ks < K - k)[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=(ks < K - k)[:, None], other=0.0)
        if IN_PARTS:
            part = tl.dot(x, w, part, input_precision=PRECISION)
            acc, part = add_part(acc, part, k + BLOCK_K, K)
        else:
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
    if IN_PARTS:
        acc += part

    if SPLIT:
        partial_rows = (tl.program_id(1) * M + rows).to(tl.int64)[:, None]
        tl.store(y_a + partial_rows * N + cols[None, :], acc, mask=(rows < M)[:, None] & (cols < N)[None, :])
    else:
        worn = worn_by_tile(row, Routing(M, mix_size, rows_per_mix, mixes_ptr, route_ptr), BLOCK_M, TWO_MIXES)
        site = Site(epilogue_a.l_out, stride_l_out)
        finish(acc, row, col, y_a, epilogue_a.bias, site, worn, M, N, PIECE, BY_DESCRIPTOR=False)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    l_in: Tensor | None,
    l_out: Tensor | None,
    mixes: Tensor,
    route: Tensor,
    out: Tensor | None = None,
    config: LinearConfig | None = None,
) -> Tensor:
    """Return s_out ∘ (W (s_in ∘ x) + b) in x.dtype.

    Args:
        x: [M, K], fp16, bf16 or fp32; any row stride, columns contiguous.
        weight: [N, K] of x.dtype, any strides.
        bias: [N], contiguous, or None.
        l_in: [capacity, K], the input site's slice of the bank; any row stride, columns contiguous; or None.
        l_out: [capacity, N], the same for the output site; or None.
        mixes: int32 [slots, 2 + 2K], contiguous.
        route: int32 [R], contiguous, M % R == 0.
        out: [M, N] of x.dtype, contiguous; made where None.
        config: block sizes; chosen by shape and device where None.

    """
    y = x.new_empty((x.shape[0], weight.shape[0])) if out is None else out
    launch(x, l_in, [Layer(weight, bias, l_out)], [y], mixes, route, config)
    return y


def launch(
    x: Tensor,
    l_in: Tensor | None,
    layers: Sequence[Layer],
    ys: Sequence[Tensor],
    mixes: Tensor,
    route: Tensor,
    config: LinearConfig | None = None,
) -> None:
    """Write the results of one layer, or of two that are alike, to ys; the others are the arguments of `linear`."""
    M = x.shape[0]
    if M == 0:
        return
    routing = Routing.of(mixes, route, M)
    if l_in is not None:
        x = scale(x, l_in, mixes, route)
    config = config or plan(x, l_in is not None, layers, ys, routing.per_row)
    if config is None:
        multiply(x, layers, ys, mixes, route)
    elif config.resident:
        linear_tma(x, layers, ys, routing, config, processors_of(x.device))
    else:
        _launch_pointers(x, layers, ys, routing, config)


def multiply(x: Tensor, layers: Sequence[Layer], ys: Sequence[Tensor], mixes: Tensor, route: Tensor) -> None:
    """Let torch multiply, and scale in a pass of its own; the arguments are those of `launch`."""
    for (weight, bias, l_out), y in zip(layers, ys, strict=True):
        if bias is None:
            torch.mm(x, weight.t(), out=y)
        else:
            torch.addmm(bias, x, weight.t(), out=y)
        if l_out is not None:
            scale(y, l_out, mixes, route, out=y)


def _launch_pointers(
    x: Tensor, layers: Sequence[Layer], ys: Sequence[Tensor], routing: Routing, config: LinearConfig
) -> None:
    """Run linear_kernel, and sum_kernel where several programs share a sum."""
    weight, _, l_out = layers[0]
    (M, K), N, splits = x.shape, weight.shape[0], config.splits
    partials = x.new_empty((len(layers), splits, M, N), dtype=torch.float32) if splits > 1 else None
    written = ys if partials is None else partials
    operands = [(layer.weight, layer.epilogue, out) for layer, out in zip(layers, written, strict=True)]
    run(
        linear_kernel,
        (len(layers) * config.tiles(M, N), splits),
        x,
        *weight.stride(),
        *of_layers(operands),
        Site.of(l_out).stride,
        x.stride(0),
        K,
        N,
        *routing,
        TWO_MIXES=routing.two_mixes(config.block_m),
        SPLIT=splits > 1,
        PRECISION=precision_of(x.dtype),
        **config.build_options(),
    )
    if partials is not None:
        add_partials(layers, ys, partials, routing)
