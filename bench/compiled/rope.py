"""The launches of the rotary embedding, of its gradient and into a cache, on the parts of one projection."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ia3rt.bench.compiled.case import Case, empty, routing, site
from ia3rt.kernels.rope import rope, rope_gradient, rope_into_cache


class _Shape(NamedTuple):
    """An attention layer of a model."""

    heads: int
    heads_kv: int
    D: int
    rotary: int
    by_head: bool = False
    """Whether q, k and v lie head by head, as in GPT-NeoX, and not side by side."""
    interleaved: bool = False


LLAMA = _Shape(32, 8, 128, 128)
SMOLLM = _Shape(9, 3, 64, 64)
NEOX = _Shape(64, 64, 96, 24, by_head=True)
COHERE = _Shape(64, 8, 128, 128, interleaved=True)
PHI = _Shape(32, 32, 80, 32)


def _parts(fused: Tensor, shape: _Shape) -> tuple[Tensor, ...]:
    """Return q, k and v [rows, heads, D] of a projection's output, or of its vectors."""
    parts: tuple[Tensor, ...]
    if shape.by_head:
        parts = fused.view(len(fused), shape.heads, 3, shape.D).unbind(2)
    else:
        heads = fused.view(len(fused), -1, shape.D)
        parts = torch.split(heads, [shape.heads, shape.heads_kv, shape.heads_kv], 1)
    return parts


def _rotate(run: Callable[..., object], rows: int, R: int, shape: _Shape, dtype: torch.dtype, has_scale: bool) -> None:
    width = (shape.heads + 2 * shape.heads_kv) * shape.D
    x = _parts(empty(rows, width, dtype=dtype), shape)
    l = _parts(site(width, 4096), shape) if has_scale else (None,) * 3  # noqa: E741
    table = empty(rows, shape.rotary, dtype=dtype)
    run(*x, *l, table, table, *routing(R), shape.interleaved)


def _k_alone_has_a_vector(q: Tensor, k: Tensor, v: Tensor, l_q: Any, l_k: Any, l_v: Any, *arguments: Any) -> None:
    rope(q, k, v, None, l_k, None, *arguments)


def _gradient_without_v(q: Tensor, k: Tensor, v: Tensor, l_q: Any, l_k: Any, l_v: Any, *arguments: Any) -> None:
    """Launch as the gradient of the vectors does: it needs Pᵀ dy alone, which for v is dy."""
    rope_gradient(q, k, None, None, None, None, *arguments)


def _into_cache(q: Tensor, k: Tensor, *arguments: Any) -> None:
    cache = empty(2, 1024, 16, *k.shape[1:], dtype=k.dtype)
    rope_into_cache(q, k, *arguments, *cache, empty(len(q), dtype=torch.int64))


def _case(
    run: Callable[..., object],
    rows: int,
    R: int,
    shape: _Shape,
    dtype: torch.dtype = torch.bfloat16,
    wide_loads: int = 14,
) -> Case:
    """Return a launch as a case. A program reads 16 bytes at once, of cos and sin and of q, k and v, all of them."""
    launch = partial(_rotate, run, rows, R, shape, dtype)
    return Case(launch, matrix=False, max_registers=128, wide_loads=wide_loads)


CASES: dict[str, Case] = {
    "rope, Llama-3-8B, uniform": _case(rope, 4096, 1, LLAMA),
    "rope, Llama-3-8B, one mix a row": _case(rope, 4096, 4096, LLAMA),
    "rope, Llama-3-8B, 4 rows": _case(rope, 4, 4, LLAMA),
    "rope, Llama-3-8B, fp32": _case(rope, 4096, 1, LLAMA, torch.float32),
    "rope gradient, Llama-3-8B, uniform": _case(rope_gradient, 4096, 1, LLAMA),
    "rope gradient, Llama-3-8B, one mix a row": _case(rope_gradient, 4096, 4096, LLAMA),
    "rope gradient, Llama-3-8B, without v": _case(_gradient_without_v, 4096, 1, LLAMA, wide_loads=12),
    "rope into a cache, Llama-3-8B, uniform": _case(_into_cache, 4096, 1, LLAMA),
    "rope into a cache, Llama-3-8B, one mix a row": _case(_into_cache, 64, 64, LLAMA),
    "rope, Llama-3-8B, k alone has a vector": _case(_k_alone_has_a_vector, 4096, 1, LLAMA),
    "rope, SmolLM2-135M, uniform": _case(rope, 4096, 1, SMOLLM),
    "rope into a cache, SmolLM2-135M, one mix a row": _case(_into_cache, 64, 64, SMOLLM),
    # A few numbers of each head are rotated: the others are read 16 bytes at once.
    "rope, GPT-NeoX-20B, one mix a row": _case(rope, 4096, 8, NEOX, torch.float16, wide_loads=3),
    "rope, Phi-2, uniform": _case(rope, 4096, 1, PHI, wide_loads=3),
    "rope, Command-R, one mix a row": _case(rope, 4096, 4096, COHERE),
    "rope gradient, Command-R, uniform": _case(rope_gradient, 4096, 1, COHERE),
}
