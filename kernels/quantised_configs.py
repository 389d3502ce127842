"""Block sizes of linear_quantised.py, by shape, kind and architecture, as in configs.py."""

import functools
from dataclasses import replace

import torch

from ia3rt.kernels.configs import splits_for
from ia3rt.kernels.tuned import LinearConfig, QuantisedShape, dtype_name, rounded_rows, tuned_configs

INT4_STEP = 32
"""The shortest step along K for int4, whose nibbles are joined to neighbours along K.

Behind such a join Triton 3.6 and 3.7 give a thread 8 neighbours along K of an operand of mma.sync, and four threads 32.
Where a step has 16, they take 8 of them twice and drop the others, and half of the columns take other columns' weights.
`bench.compiled` sees it in the code.
"""


@functools.lru_cache(4096)
def linear_quantised_config(
    rows: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    arch: str,
    processors: int,
    kind: str,
    group_size: int,
    *,
    per_row: bool,
    act_order: bool = False,
    card: str | None = None,
) -> LinearConfig | None:
    """Return the config of linear_quantised.py's kernel for x [rows, K] and y [rows, N]; None to dequantise before.

    Many rows are that on sm_90: the kernel took 1.6 to 7 times as long as a matmul in bf16, and a pass over W and
    torch's matmul are to take 1.1 to 1.9. In fp32 torch multiplies many rows faster, as in linear_config. `act_order`
    says that each number along K has a group of its own. What was measured on `card` comes before that.

    A step along K is no longer than a group, so that each needs one row of scales, where a group has at least 16; but
    of int4 it has at least INT4_STEP.
    """
    shape = QuantisedShape(rounded_rows(rows), N, K, dtype_name(dtype), kind, group_size, per_row)
    if card is not None and not act_order and shape in tuned_configs(card, "linear_quantised"):
        tuned: LinearConfig | None = tuned_configs(card, "linear_quantised")[shape]
        return tuned
    if rows > 64 and (arch == "sm_90" or dtype == torch.float32):
        return None
    stages = 2 if arch.startswith("gfx") else 3
    if dtype == torch.float32:
        block_m, num_warps = (16, 4) if rows <= 16 else (64, 8)
        config = LinearConfig(block_m, 64, 16 if rows > 16 else 32, 8, num_warps, num_stages=2, piece=64)
    elif rows > 64:
        config = LinearConfig(128, 128, 64, 8, 8, stages, piece=16 if per_row else 64)
    else:
        block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
        if arch == "sm_90":
            config = _of_few_rows(block_m, N, kind, act_order)
        else:
            block_k = 128 if rows <= 32 and not kind.startswith("gptq") else 64  # its words take registers to unpack
            config = LinearConfig(block_m, 64, block_k, 1, num_warps=4, num_stages=stages, piece=64)
    # The largest power of two that divides the group.
    block_k = min(config.block_k, group_size & -group_size) if group_size >= 16 else config.block_k
    config = replace(config, block_k=max(INT4_STEP if kind == "int4" else 16, block_k))
    if rows > 64:
        return config
    if arch != "sm_90" or dtype == torch.float32:
        return replace(config, splits=splits_for(config, rows, N, K, processors))
    # So many programs that enough of W is in flight: as measured, two a processor, and more in shorter steps. Each has
    # at least 512 numbers along K, or four steps where a group cuts them short, and all parts no more bytes than W.
    programs = processors * (2 if config.block_k == 128 else 3 if config.block_k == 64 else 256 // config.block_k)
    most = K * (1 if group_size == 0 else 0.5) // (4 * rows)
    if config.block_k >= 64:
        most = min(most, K // 512)
    return replace(config, splits=int(max(1, min(most, splits_for(config, rows, N, K, programs)))))


def _of_few_rows(block_m: int, N: int, kind: str, act_order: bool) -> LinearConfig:
    """Return the config on sm_90, by what was measured on an H100.

    Wide tiles read x less often, where there are columns enough. Of four bits two warps were faster, in shorter steps,
    as a thread unpacks more of them; with a group a number along K they take its scale's registers too.
    """
    four_bits = kind not in ("int8", "fp8")
    if block_m == 16 and not act_order and (4096 if four_bits else 8192) <= N:
        block_k, num_warps = (64, 2) if four_bits else (128, 4)
        return LinearConfig(block_m, 128, block_k, 1, num_warps, num_stages=4, piece=64)
    return LinearConfig(block_m, 64, 64 if act_order else 128, 1, num_warps=4, num_stages=4, piece=64)
