"""Reads what a quantised layer holds, where the kernels compute with its format."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Quantised(NamedTuple):
    """A quantised weight; ops.linear_quantised says what each part is."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    groups: Tensor | None
    kind: str
    group_size: int


def read_torchao(weight: Tensor) -> Quantised | None:
    """What one of torchao's tensors holds; None if it is not of a plain, weight-only layout.

    Known by name: torchao need not be installed. Those that quantise or scale the activation too are left to it, and
    so are layouts that are shuffled for one kernel.
    """
    cls = type(weight)
    if not cls.__module__.startswith("torchao.") or weight.ndim != 2 or weight.requires_grad:
        return None
    tensor: Any = weight
    if getattr(tensor, "act_quant_kwargs", None) is not None or getattr(tensor, "act_pre_scale", None) is not None:
        return None
    (N, K), block = weight.shape, list(tensor.block_size) if hasattr(tensor, "block_size") else []
    # int8 is symmetric: torchao's own matmul does not read its zero points, which are zeros.
    if cls.__name__ == "Int8Tensor" and block == [1, K] and tensor.qdata.dtype == torch.int8:
        return Quantised(tensor.qdata, tensor.scale.reshape(N), None, None, "int8", 0)
    if cls.__name__ == "Float8Tensor" and block == [1, K] and tensor.qdata.dtype == torch.float8_e4m3fn:
        return Quantised(tensor.qdata, tensor.scale.reshape(N), None, None, "fp8", 0)
    if cls.__name__ == "Int4Tensor" and tensor.activation_dtype == torch.bfloat16:
        return Quantised(tensor.qdata, tensor.scale, tensor.zero_point, None, "int4", block[1])
    return None


_REPACKED = ("q_handle", "q4", "workspace", "gemm", "qlinear")
"""What layers keep whose kernel wants qweight in another order of the same shape: ExLlama's, Marlin's."""


def is_gptq(layer: nn.Module) -> bool:
    """Whether a layer has what GPTQ's layers have, whatever its class: qweight, and in_features and out_features."""
    names = ("qweight", "qzeros", "scales", "in_features", "out_features")
    return all(hasattr(layer, name) for name in names)


def read_gptq(layer: nn.Module) -> Quantised | None:
    """What a layer of AutoGPTQ's or GPTQModel's holds; None if it is not of 4 bits, or its order is another."""
    module: Any = layer
    if not is_gptq(layer) or getattr(module, "bits", 4) != 4 or any(hasattr(module, name) for name in _REPACKED):
        return None
    K, N = module.in_features, module.out_features
    qweight, qzeros, scales, g_idx = module.qweight, module.qzeros, module.scales, getattr(module, "g_idx", None)
    if (qweight.dtype, qzeros.dtype) != (torch.int32, torch.int32) or K % 8 or N % 8:
        return None
    count = scales.shape[0]
    shapes = [tuple(tensor.shape) for tensor in (qweight, qzeros, scales)]
    if shapes != [(K // 8, N), (count, N // 8), (count, N)] or K % count:
        return None
    version = module.qzero_format() if hasattr(module, "qzero_format") else 1
    if g_idx is not None and (tuple(g_idx.shape) != (K,) or not getattr(module, "desc_act", True)):
        g_idx = None  # the groups are neighbours
    return Quantised(
        qweight,
        scales,
        qzeros,
        g_idx if g_idx is None else g_idx.to(torch.int32),
        "gptq" if version == 1 else "gptq_v2",
        K // count,
    )
