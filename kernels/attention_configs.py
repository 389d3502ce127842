"""Block sizes of the attention kernels, by shape, dtype and architecture, as in configs.py."""

import torch

from ia3rt.kernels.configs import DESCRIPTOR_ARCHS
from ia3rt.kernels.tuned import AttentionConfig, AttentionShape, dtype_name, rounded_rows, tuned_configs


def padded(D: int) -> int:
    """Return BLOCK_D, the numbers that a tile has of a head: a power of two, and what a product needs at least."""
    return max(16, 1 << (D - 1).bit_length())


def attention_config(
    rows: int,
    D: int,
    dtype: torch.dtype,
    arch: str,
    processors: int,
    *,
    heads: int,
    masked: bool,
    plain: bool,
    card: str | None = None,
) -> AttentionConfig:
    """Return the config of attention_kernel for `heads` blocks of `rows` query rows of D numbers.

    `masked` says that there is a mask tensor; `plain` that nothing but a causal mask says who sees whom. Of
    these, what was measured on `card` comes before the defaults.
    """
    if card is not None and plain and rows > 64:
        tuned = tuned_configs(card, "attention").get(AttentionShape(rounded_rows(rows), heads, D, dtype_name(dtype)))
        if tuned is not None:
            return tuned
    block_d = padded(D)
    few = 16 if rows <= 16 else 32 if rows <= 32 else 64
    large = arch in DESCRIPTOR_ARCHS
    if dtype == torch.float32:  # exact products run on the FMA units, whose operands live in registers
        return AttentionConfig(16 if block_d > 64 else min(few, 32), 32 if block_d <= 128 else 16, 4, 1)
    if rows <= 64:
        return AttentionConfig(few, 64 if block_d <= 128 else 32, 4, 3 if large else 2 if block_d <= 128 else 1)
    if not large:
        return AttentionConfig(128 if block_d <= 128 and not masked else 64, 32, 8, 1)
    # Addresses of a mask, one a score, and a head padded to a power of two take registers too; tiny heads, on sm_100.
    if block_d > 128 or D < 16:
        return AttentionConfig(64, 32, 8, 2)
    if arch == "sm_90" and plain and D in (64, 128):  # as measured on an H100
        if D == 64:
            return AttentionConfig(64, 64, 4, 4)
        # Tall tiles read the keys less often. But under a causal mask their work differs, and few do not even out.
        if -(-rows // 128) * heads <= 4 * processors:
            return AttentionConfig(64, 64, 4, 2)
    return AttentionConfig(128, 16 if masked else 32 if block_d != D or arch != "sm_90" else 64, 8, 2)


def attention_gradient_configs(
    D: int, dtype: torch.dtype, arch: str, *, masked: bool
) -> tuple[AttentionConfig, AttentionConfig]:
    """Return the configs of the gradients of keys and of queries: block_m queries and block_n keys."""
    block_d = padded(D)
    large = arch in DESCRIPTOR_ARCHS
    if dtype == torch.float32:
        size, warps = 32 if block_d <= 64 else 16, 8 if block_d > 64 else 4
        return AttentionConfig(16, 32 if block_d <= 128 else 16, warps, 1), AttentionConfig(16, size, warps, 1)
    if block_d > 128:
        rows = 16 if arch.startswith("gfx") else 32
        return AttentionConfig(rows, 32, 8, 1), AttentionConfig(rows, 64 if large else 32, 8, 1)
    warps, stages = 4 if block_d <= 64 else 8, 2 if large else 1
    # Addresses of a mask take the registers of half a tile.
    return (
        AttentionConfig(32, 32 if masked else 64, warps, stages),
        AttentionConfig(64, 64 if large else 32, warps, stages),
    )
