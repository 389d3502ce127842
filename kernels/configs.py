"""Block sizes by shape, dtype and architecture: plain functions, so a launch costs no search and a build no GPU.

Architectures are named as compilers name them: "sm_80", "sm_90", "sm_100", "gfx942".
"""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LinearConfig:
    """How linear_kernel is built: its tile, the row blocks that share a column of W in L2, warps, pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ScaleConfig:
    """How scale_kernel is built: its tile and warps."""

    block_m: int
    block_n: int
    num_warps: int


@functools.cache
def arch_of(device: torch.device) -> str:
    """Return the architecture of a CUDA or ROCm device; sm_80, the smallest supported, for any other."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def linear_config(
    rows: int, N: int, K: int, dtype: torch.dtype, arch: str, *, per_row: bool, scales_input: bool
) -> LinearConfig:
    """Return the config of linear_kernel for x [rows, K] and y [rows, N].

    It depends on `rows` through a few bounds only, so a growing batch meets a handful of compilations. `per_row` says
    that the rows wear different mixes: then the scale is as large a tile as the accumulator, and registers are short.
    `scales_input` says that the kernel scales x as well.
    """
    if dtype == torch.float32 or N % 16 or K % 16:
        # Exact fp32 runs on the FMA units, whose operands live in registers. And Triton knows of no alignment but 16:
        # other sizes are loaded one element at a time, by way of registers too.
        return LinearConfig(16 if rows <= 16 else 64, 64, 32, 8, num_warps=4 if rows <= 16 else 8, num_stages=2)
    stages = 2 if arch.startswith("gfx") else 4  # CDNA3 has 64 KiB of shared memory
    if rows <= 32:
        # The weight is all the traffic: narrow tiles, so that more of the device's processors read it.
        # Beside an input scale they are shallow too, as the bank's rows take registers and shared memory.
        block_m, block_n, block_k = 16 if rows <= 16 else 32, 64 if N >= 8192 else 32, 64 if scales_input else 128
        return LinearConfig(block_m, block_n, block_k, 1, num_warps=4, num_stages=stages)
    if rows <= 64:
        return LinearConfig(64, 64, 64, 1, num_warps=4, num_stages=stages)
    wide = arch == "sm_90" and not per_row and rows >= 1024 and N >= 2048
    return LinearConfig(128, 256 if wide else 128, 64, 8, num_warps=8, num_stages=min(stages, 3))


def scale_config(rows: int, N: int, uniform: bool) -> ScaleConfig:
    """Return the config of scale_kernel. Where all rows wear one mix, a taller tile reads the bank less often."""
    return ScaleConfig(8 if uniform and rows > 8 else 4, 256 if N <= 256 else 512, num_warps=4)
