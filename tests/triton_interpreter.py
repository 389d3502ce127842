"""Repairs Triton's interpreter where it computes bf16 otherwise than a GPU does.

It holds bf16 as raw uint16, so that tl.dot multiplies bit patterns, and it truncates fp32 → bf16 where hardware rounds
to nearest even. Elementwise bf16 arithmetic stays broken: kernels do it in fp32.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _to_fp32(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(data: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def install() -> None:
    """Patch the interpreter in this process."""
    cast = InterpreterBuilder.cast_impl
    dot = InterpreterBuilder.create_dot

    def cast_impl(self, src, dst_type):
        types = src.dtype.scalar, dst_type.scalar
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle(_to_fp32(src.data), tl.float32)
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(_to_bf16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, *args):
        # fp16 too: its products are exact in fp32, and a matmul of one dtype goes to BLAS.
        if a.dtype.scalar in (tl.float16, tl.bfloat16):
            a, b = cast_impl(self, a, tl.float32), cast_impl(self, b, tl.float32)
        return dot(self, a, b, d, *args)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
