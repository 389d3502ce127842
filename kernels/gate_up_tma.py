"""gate_up.py's kernel for many rows on sm_90 and up: persistent, fed by the tensor memory accelerator.

x, the weights and h are tensor descriptors, as in linear_tma.py: each wgmma has both operands in shared memory, and a
tile of x serves two of them. A program takes every num_programs-th tile. The two halves of one fused weight are two
descriptors. What makes h of the sums is behind the loop over K.
"""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ia3rt.kernels.gate_up_tile import finish_gate_up
from ia3rt.kernels.launch import run
from ia3rt.kernels.linear_tile import tile_of
from ia3rt.kernels.linear_tma import is_describable
from ia3rt.kernels.mixes import ROUTING, Routing, Site, worn_by_tile
from ia3rt.kernels.tuned import LinearConfig
from ia3rt.reference import Activation


@triton.jit(do_not_specialize=ROUTING)
def gate_up_tma_kernel(
    x,  # descriptor of [M, K], blocks [BLOCK_M, BLOCK_K]
    gate,  # descriptor of [N, K], blocks [BLOCK_N, BLOCK_K]; where TRANSPOSED of [K, N], blocks [BLOCK_K, BLOCK_N]
    up,  # as gate, or None
    biases,  # of gate and of up, [N] or None
    y,  # descriptor of [M, N], blocks [BLOCK_M, PIECE]
    site,  # of width N
    K,
    N,
    M,
    mix_size,
    rows_per_mix,
    mixes_ptr,
    route_ptr,
    TWO_MIXES: tl.constexpr,  # whether a tile wears two mixes at most
    TRANSPOSED: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Compute this program's tiles of y. What a descriptor reads past the end is zero, what it writes is dropped."""
    routing = Routing(M, mix_size, rows_per_mix, mixes_ptr, route_ptr)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, col = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        gate_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up_sum = None
        if up is not None:
            up_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            x_tile = x.load([row, k])
            w_gate = gate.load([k, col]) if TRANSPOSED else gate.load([col, k]).T
            gate_sum = tl.dot(x_tile, w_gate, gate_sum)
            if up is not None:
                w_up = up.load([k, col]) if TRANSPOSED else up.load([col, k]).T
                up_sum = tl.dot(x_tile, w_up, up_sum)
        # Loaded here, so that they take no registers during the loop.
        worn = worn_by_tile(row, routing, BLOCK_M, TWO_MIXES)
        finish_gate_up(gate_sum, up_sum, row, col, y, biases, site, worn, M, N, KIND, PIECE, BY_DESCRIPTOR=True)


def fits_descriptors(x: Tensor, gate: Tensor, up: Tensor | None, y: Tensor) -> bool:
    """Return whether gate_up_tma can take x [M, K], y [M, N] and these weights [N, K], which may lie transposed."""
    weights = (gate,) if up is None else (gate, up)
    is_plain = all(is_describable(weight) for weight in weights)
    return is_describable(x) and is_describable(y) and (is_plain or all(is_describable(w.t()) for w in weights))


def gate_up_tma(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None],
    site: Site,
    y: Tensor,
    routing: Routing,
    kind: Activation,
    config: LinearConfig,
    processors: int,
) -> None:
    """Write s ∘ act(W_gate x + b_gate) ∘ (W_up x + b_up) to y, for operands that fits_descriptors accepts."""
    (M, K), N = x.shape, gate.shape[0]
    transposed = not is_describable(gate)
    block_w = [config.block_k, config.block_n] if transposed else [config.block_n, config.block_k]

    def described(weight: Tensor) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(weight.t() if transposed else weight, block_w)

    run(
        gate_up_tma_kernel,
        (min(config.tiles(M, N), config.resident * processors),),
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        described(gate),
        None if up is None else described(up),
        biases,
        TensorDescriptor.from_tensor(y, [config.block_m, config.piece]),
        site,
        K,
        N,
        *routing,
        TWO_MIXES=routing.two_mixes(config.block_m),
        TRANSPOSED=transposed,
        KIND=kind,
        **config.build_options(),
    )
