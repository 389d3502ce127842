"""The dtypes that a model's files hold, by their headers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def stored_dtypes(folder: Path) -> tuple[str, ...]:
    """torch's names of the floating-point dtypes of a folder's weights; none where it has none.

    They are those in `model*.safetensors`, which transformers prefers, else in `pytorch_model*.bin`, of which no number
    is read and no code is run.
    """
    found = set()
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118 (it is no mapping)
    names = {name for dtype, name in _NAMES.items() if dtype in found}
    for file in folder.glob("pytorch_model*.bin") if not found else ():
        stored = torch.load(file, map_location="meta", weights_only=True).values()
        dtypes = {tensor.dtype for tensor in stored if isinstance(tensor, torch.Tensor)}
        names |= {str(dtype).removeprefix("torch.") for dtype in dtypes if dtype.is_floating_point}
    return tuple(sorted(names))
