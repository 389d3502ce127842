"""Repairs Triton's interpreter where it computes otherwise than a GPU does.

It holds bf16 as raw uint16, so that tl.dot multiplies bit patterns, and it truncates fp32 → bf16 where hardware rounds
to nearest even. Elementwise bf16 arithmetic stays broken: kernels do it in fp32. It replaces Triton's language for all
threads, so that one waits for another here, and does so for each kernel that runs, which takes longer than most of ours
do in it: here it stays replaced. And it leaves products of fp32 to a
library, which adds them in parts, where compiled code multiplies and adds one after another: a sum that is too long
would err on a GPU only. And it describes the shape of each value anew, which takes a fourth of its time: here it keeps
what it made of a shape.
"""

import math
import threading

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


def _to_fp32(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(data: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def _added_in_order(a: np.ndarray, b: np.ndarray, d: np.ndarray) -> np.ndarray:
    """d + a b in fp32, by fused multiplications and additions: a product of two numbers is exact in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(a.shape[-1]):
        d = (a[..., :, k, None] * b[..., None, k, :] + d).astype(np.float32)
    return d


class _Kept:
    """What was replaced, and stays so."""

    def restore(self) -> None:
        """Nothing."""


def _replaced_once() -> None:
    """Let the language stay replaced: no process that interprets kernels compiles any."""
    replace, replaced = interpreter._patch_lang, set()

    def replace_once(fn):
        if id(fn.__globals__) not in replaced:  # of a module, which stays
            replace(fn)
            replaced.add(id(fn.__globals__))
        return _Kept()

    interpreter._patch_lang = replace_once


def _shapes_described_once() -> None:
    """Let blocks of one shape and dtype share what describes them, which nothing writes on."""
    describe, blocks, shapes = tl.block_type.__init__, {}, {}

    def init_block_type(self, element_ty, shape):
        kind = type(element_ty), element_ty.name, *(getattr(size, "value", size) for size in shape)
        if kind not in blocks:
            describe(self, element_ty, shape)
            blocks[kind] = vars(self).copy()
        vars(self).update(blocks[kind])

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        sizes = (*type.shape,) if type.is_block() else ()
        if sizes not in shapes:
            shapes[sizes] = tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))
        self.shape, self.numel = shapes[sizes]

    tl.block_type.__init__ = init_block_type
    tl.tensor.__init__ = init_tensor

    get_dtype, dtypes = interpreter._get_np_dtype, {}

    def get_np_dtype(tt_dtype):
        name = tt_dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = get_dtype(tt_dtype)
        return dtypes[name]

    interpreter._get_np_dtype = get_np_dtype


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
        elif a.dtype.scalar == tl.float32:
            return TensorHandle(_added_in_order(a.data, b.data, d.data), d.dtype.scalar)
        return dot(self, a, b, d, *args)

    run, lock = GridExecutor.__call__, threading.RLock()

    def run_alone(self, *args, **kwargs):
        with lock:
            return run(self, *args, **kwargs)

    _replaced_once()
    _shapes_described_once()
    GridExecutor.__call__ = run_alone
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
