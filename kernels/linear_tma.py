"""The linear layer of many rows on sm_90 and up: y = s ∘ (W x + b), persistent, fed by the tensor memory accelerator.

x, W and y are tensor descriptors, so that the copies between global and shared memory cost a thread no registers and no
addresses, and both operands of each wgmma are in shared memory. A program takes every num_programs-th tile. The scale
touches the epilogue only: the loop over K is the one of a linear layer without a scale, instruction for instruction.
"""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ia3rt.kernels.launch import run
from ia3rt.kernels.linear_tile import Layer, finish, of_layers, tile_of
from ia3rt.kernels.mixes import ROUTING, Routing, Site, worn_by_tile
from ia3rt.kernels.tuned import LinearConfig


@triton.jit
def descriptor_tile(
    tile,
    x,
    weight,
    epilogue,
    y,
    stride_l_out,
    routing,
    N,
    K,
    TWO_MIXES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Compute one [BLOCK_M, BLOCK_N] tile of y; the arguments are linear_tma_kernel's.

    What a descriptor reads past the end is zero, and what it writes there is dropped.
    """
    M = routing.rows
    row, col = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        w = weight.load([k, col]) if TRANSPOSED else weight.load([col, k]).T
        acc = tl.dot(x.load([row, k]), w, acc)
    # Loaded here, so that they take no registers during the loop.
    worn = worn_by_tile(row, routing, BLOCK_M, TWO_MIXES)
    site = Site(epilogue.l_out, stride_l_out)
    finish(acc, row, col, y, epilogue.bias, site, worn, M, N, PIECE, BY_DESCRIPTOR=True)


@triton.jit(do_not_specialize=ROUTING)
def linear_tma_kernel(
    x,  # descriptor of [M, K], blocks [BLOCK_M, BLOCK_K]
    weight_a,  # descriptor of [N, K], blocks [BLOCK_N, BLOCK_K]; where TRANSPOSED of [K, N], blocks [BLOCK_K, BLOCK_N]
    epilogue_a,
    y_a,  # descriptor of [M, N], blocks [BLOCK_M, PIECE]
    weight_b,  # and those of the second layer, which is like the first; None where there is one
    epilogue_b,
    y_b,
    stride_l_out,
    K,
    N,
    M,
    mix_size,
    rows_per_mix,
    mixes_ptr,
    route_ptr,
    TWO_MIXES: tl.constexpr,  # whether a tile wears two mixes at most
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Compute this program's tiles of y_a, then those of y_b.

    Descriptors cannot be chosen between. So there are two loops; in two branches, every wgmma would wait.
    """
    routing = Routing(M, mix_size, rows_per_mix, mixes_ptr, route_ptr)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        descriptor_tile(
            tile,
            x,
            weight_a,
            epilogue_a,
            y_a,
            stride_l_out,
            routing,
            N,
            K,
            TWO_MIXES,
            TRANSPOSED,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            GROUP_M,
            PIECE,
        )
    if weight_b is not None:
        # The programs that had one tile of y_a fewer begin with y_b.
        begin = (tl.program_id(0) + tl.num_programs(0) - tiles % tl.num_programs(0)) % tl.num_programs(0)
        for tile in range(begin, tiles, tl.num_programs(0)):
            descriptor_tile(
                tile,
                x,
                weight_b,
                epilogue_b,
                y_b,
                stride_l_out,
                routing,
                N,
                K,
                TWO_MIXES,
                TRANSPOSED,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                GROUP_M,
                PIECE,
            )


def is_describable(matrix: Tensor) -> bool:
    """Return whether the hardware can copy blocks of a matrix: rows contiguous, apart, and at multiples of 16 bytes."""
    stride, item = matrix.stride(0), matrix.element_size()
    is_rows = matrix.stride(1) == 1 and stride >= matrix.shape[1]
    return is_rows and stride * item % 16 == 0 and matrix.data_ptr() % 16 == 0


def fits_descriptors(x: Tensor, layers: Sequence[Layer], ys: Sequence[Tensor]) -> bool:
    """Return whether linear_tma can take x [M, K], ys [M, N] and these layers, whose weights may lie transposed."""
    return all(is_describable(matrix) for matrix in (x, *ys)) and all(
        is_describable(layer.weight) or is_describable(layer.weight.t()) for layer in layers
    )


def linear_tma(
    x: Tensor,
    layers: Sequence[Layer],
    ys: Sequence[Tensor],
    routing: Routing,
    config: LinearConfig,
    processors: int,
) -> None:
    """Write s_out ∘ (W x + b) of one layer, or of two that are alike, for operands that fits_descriptors accepts."""
    first = layers[0]
    (M, K), N = x.shape, first.weight.shape[0]
    transposed = not is_describable(first.weight)
    block_w = [config.block_k, config.block_n] if transposed else [config.block_n, config.block_k]
    operands = []
    for layer, y in zip(layers, ys, strict=True):
        weight_blocks = TensorDescriptor.from_tensor(layer.weight.t() if transposed else layer.weight, block_w)
        y_blocks = TensorDescriptor.from_tensor(y, [config.block_m, config.piece])
        operands.append((weight_blocks, layer.epilogue, y_blocks))
    tiles = len(layers) * config.tiles(M, N)
    run(
        linear_tma_kernel,
        (min(tiles, config.resident * processors),),
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        *of_layers(operands),
        Site.of(first.l_out).stride,
        K,
        N,
        *routing,
        TWO_MIXES=routing.two_mixes(config.block_m),
        TRANSPOSED=transposed,
        **config.build_options(),
    )
