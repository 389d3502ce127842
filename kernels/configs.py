"""Block sizes by shape, dtype and architecture: plain functions, so a launch costs no search and a build no GPU.

Architectures are named as compilers name them: "sm_80", "sm_90", "sm_100", "gfx942".
"""

import functools
from dataclasses import dataclass, replace

import torch

from ia3rt.kernels.tuned import LinearConfig, LinearShape, dtype_name, linear_configs, rounded_rows


@dataclass(frozen=True)
class ScaleConfig:
    """How scale_kernel and the activation kernels are built: their tile and warps."""

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


@functools.cache
def processors_of(device: torch.device) -> int:
    """Return the number of multiprocessors of a CUDA or ROCm device; 4 for any other, which only a test launches on."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def card_of(device: torch.device) -> str | None:
    """Return the name of a CUDA or ROCm device, by which its measured configs are filed; None for any other."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


READING = 32
"""How many products a processor of sm_90 forms while it reads one number of an operand, by what tuning chose."""

IN_FLIGHT = 48 << 10
"""The bytes of W that a processor of sm_90 has to wait for at once, so that the memory is never idle.

Of all block sizes that were measured for few rows, with weights of 4, 8 and 16 bits, the fastest have 32 to 64 KiB.
"""

DESCRIPTOR_ARCHS = ("sm_90", "sm_100", "sm_103")
"""Those with a tensor memory accelerator, and the shared memory of a data centre's GPU."""


@functools.lru_cache(4096)
def linear_config(
    rows: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    arch: str,
    processors: int,
    *,
    per_row: bool,
    scales_input: bool,
    descriptors: bool,
    layers: int = 1,
    card: str | None = None,
) -> LinearConfig | None:
    """Return the config of a linear layer's kernel for x [rows, K] and y [rows, N]; None where torch does it better.

    That is so for many rows of fp32: exact products keep the tensor cores out, and to reach a library's FMA kernels
    takes more than the scale's own pass, which is about 1 % of such a matmul. And for an input scale alone: x is scaled
    in a pass before, and nothing is left that a kernel could spare.

    It depends on `rows` through a few bounds only, so a growing batch meets a handful of compilations. `per_row` says
    that the rows of a tile wear many mixes: then the scale is as large a tile as the accumulator, and registers are
    short. `scales_input` says that x was scaled before and y is not, `descriptors` that x, W and y can be tensor
    descriptors, and `layers` how many such layers one launch computes. What was measured on `card` comes before these
    defaults.
    """
    flags = per_row, scales_input, descriptors
    shape = LinearShape(rounded_rows(rows), N, K, dtype_name(dtype), *flags, layers)
    if card is not None and shape in linear_configs(card):
        return linear_configs(card)[shape]
    if scales_input or (dtype == torch.float32 and rows > 64):
        return None
    if rows <= 64 or N % 16 or K % 16:
        config = _pointer_config(rows, N, K, dtype, arch)
        in_flight = IN_FLIGHT if arch == "sm_90" and dtype != torch.float32 and not (N % 16 or K % 16) else None
        return replace(config, splits=splits_for(config, rows, N, K, processors // layers, dtype.itemsize, in_flight))
    if not (descriptors and arch in DESCRIPTOR_ARCHS):
        stages = 2 if arch.startswith("gfx") else 3  # CDNA3 has 64 KiB of shared memory
        return LinearConfig(128, 128, 64, 8, 8, stages, piece=64)
    if arch == "sm_90":
        return _persistent_config(rows, N, per_row, processors, layers)
    if per_row:
        # sm_100 keeps the accumulator in tensor memory, which four warps read: and these have registers enough.
        return LinearConfig(128, 128, 64, 8, 4, 3, piece=16, resident=1)
    # Two programs fit a processor where one mix leaves them the registers: one multiplies while the other stores.
    return LinearConfig(128, 128, 64, 8, 8, 3, piece=64, resident=2)


def _persistent_config(rows: int, N: int, per_row: bool, processors: int, layers: int) -> LinearConfig | None:
    """Return linear_tma.py's config on sm_90; None where torch multiplies and a pass scales.

    Each processor takes a tile at a time: a launch takes as many turns as it has tiles for each. So few rows have
    smaller tiles, of which each processor gets one; where tiles of two sizes take as long, the larger read less.
    """
    wide = not per_row and rows >= 1024 and N >= 2048
    best, least, several = None, float("inf"), False
    for block_m, block_n in ((128, 256), (128, 128), (128, 64), (64, 64))[0 if wide else 1 :]:
        num_warps = 8 if block_m * block_n >= 128 * 128 else 4
        config = LinearConfig(block_m, block_n, 64, 8, num_warps, 4, piece=16 if per_row else 64, resident=1)
        turns = -(-layers * config.tiles(rows, N) // processors)
        # What a tile multiplies; and what it reads, in products of that time.
        time = turns * (block_m * block_n + READING * (block_m + block_n))
        if time < least:
            best, least, several = config, time, turns > 1
    assert best is not None
    if best.block_n == 256:
        return replace(best, num_stages=3, piece=128)
    if not several:
        return best
    if per_row:
        # The scale of many mixes is read between two tiles, when nothing multiplies: longer than a pass of its own.
        return None
    # Two programs fit a processor where one mix leaves them the registers: one multiplies while the other stores.
    return replace(best, num_stages=3 if best.block_n == 128 else 4, piece=32, resident=2)


def _pointer_config(rows: int, N: int, K: int, dtype: torch.dtype, arch: str) -> LinearConfig:
    """Return the config for few rows, or for operands that wgmma cannot read where they lie."""
    if dtype == torch.float32 or N % 16 or K % 16:
        # Exact fp32 runs on the FMA units, whose operands live in registers. And Triton knows of no alignment but 16:
        # other sizes are loaded one element at a time, by way of registers too.
        block_m, num_warps = (16, 4) if rows <= 16 else (64, 8)
        block_k = 16 if dtype == torch.float32 and rows > 16 else 32
        return LinearConfig(block_m, 64, block_k, 8, num_warps, num_stages=2, piece=64)
    stages = 2 if arch.startswith("gfx") else 4
    # The weight is all the traffic: narrow tiles, so that more of the device's processors read it.
    if rows > 32:
        block_n, block_k = (32, 128) if arch == "sm_90" else (64, 64)
        return LinearConfig(64, block_n, block_k, 1, num_warps=4, num_stages=stages, piece=64)
    block_n = 64 if N >= 8192 or (arch == "sm_90" and rows <= 16) else 32
    return LinearConfig(16 if rows <= 16 else 32, block_n, 128, 1, num_warps=4, num_stages=stages, piece=64)


def splits_for(
    config: LinearConfig, rows: int, N: int, K: int, processors: int, itemsize: int = 2, in_flight: int | None = None
) -> int:
    """Return how many programs share each sum over K, so that a few tiles of y keep every processor reading W.

    Each has at least four steps along K, the depth of the pipeline. One split spares the second kernel. `in_flight` is
    how many bytes of W, in numbers of `itemsize`, a processor has to wait for; None for a program a processor.
    """
    programs: float = processors
    if in_flight is not None:
        programs *= in_flight / (config.block_n * config.block_k * itemsize * (config.num_stages - 1))
    wanted: int = round(programs / config.tiles(rows, N))
    possible: int = K // (4 * config.block_k)
    return max(1, min(wanted, possible))


def scale_config(rows: int, N: int, uniform: bool) -> ScaleConfig:
    """Return the config of scale_kernel. Where all rows wear one mix, a taller tile reads the bank less often."""
    return ScaleConfig(8 if uniform and rows > 8 else 4, 256 if N <= 256 else 512, num_warps=4)


def activation_config(rows: int, N: int, dtype: torch.dtype) -> ScaleConfig:
    """Return the config of the activation kernels: 16 bytes of each tensor a thread; more fills registers."""
    block_m = 4 if rows > 2 else 2
    return ScaleConfig(block_m, 256 if N <= 256 or dtype == torch.float32 else 512, num_warps=2 * block_m)


@dataclass(frozen=True)
class RopeConfig:
    """How rope_kernel is built and launched."""

    block_m: int
    most_heads: int
    """The most heads that a program takes, one after the other, with the cos and sin that it loaded."""
    num_warps: int

    def group(self, heads: int) -> int:
        """Return how many of a part's heads a program takes: as many as divide them."""
        return next(size for size in range(self.most_heads, 0, -1) if heads % size == 0)


def rope_config(rows: int, D: int, dtype: torch.dtype) -> RopeConfig:
    """Return the config of rope_kernel: 16 bytes of half a head a thread.

    A prefill's programs are many, and loading cos and sin once for several heads halves what is read. A decoded token
    has few, so that each takes one head.
    """
    rows_of_warp = max(1, 32 * (16 // dtype.itemsize) * 2 // (1 << (D - 1).bit_length()))
    num_warps = 4 if rows > rows_of_warp else 1
    return RopeConfig(rows_of_warp * num_warps, 4 if rows >= 2048 else 1, num_warps)


@functools.lru_cache(4096)
def gate_up_config(
    rows: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    arch: str,
    processors: int,
    *,
    gated: bool,
    per_row: bool,
    two_mixes: bool,
    descriptors: bool,
) -> LinearConfig | None:
    """Return the config of gate_up.py's kernel for x [rows, K] and y [rows, N]; None where torch multiplies better.

    That is so for many rows of fp32, as in linear_config. `gated` says that there are two sums, whose accumulators
    share the registers, and whose weights share the memory; `two_mixes` that a tile wears two mixes at most, and not
    one because all rows do; `per_row` and `descriptors` are linear_config's.
    """
    if dtype == torch.float32 and rows > 64:
        return None
    if rows <= 64 or N % 16 or K % 16:
        config = _pointer_config(rows, N, K, dtype, arch)
        if N % 16 or K % 16:
            return replace(config, piece=16)
        if rows > 32 or dtype == torch.float32:
            return config
        # No programs share a sum: where there are few tiles, they are narrower. A wide one would be two weights'.
        config = replace(config, block_n=32)
        return config if config.tiles(rows, N) >= processors else replace(config, block_n=16)
    if not (descriptors and arch in DESCRIPTOR_ARCHS):
        # Rows that are not aligned take more addresses, and shorter steps fewer of them.
        block_k, stages, piece = (64, 3, 16) if descriptors else (32, 4, 64)
        return LinearConfig(128, 64 if gated else 128, block_k, 8, 8, 2 if arch.startswith("gfx") else stages, piece)
    if per_row:
        num_warps = 8 if gated or arch == "sm_90" else 4  # as in linear_config; one sum leaves four the registers
        config = LinearConfig(128, 128, 64, 8, num_warps, 3, piece=16, resident=1)
        # As in _persistent_config: on an H100 the kernel took 1.15 times as long as what it replaces.
        return None if arch == "sm_90" and config.tiles(rows, N) > processors else config
    # Two programs fit a processor where one sum leaves them the registers.
    return LinearConfig(128, 128, 64, 8, 8, 3, piece=64 if gated and not two_mixes else 32, resident=1 if gated else 2)
