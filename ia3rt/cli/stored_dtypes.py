"""The dtypes that a model's files hold, by their headers."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def stored_dtypes(folder: Path) -> tuple[str, ...]:
    """torch's names of the floating-point dtypes in a folder's `model*.safetensors`; none where it has none."""
    found = set()
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118 (it is no mapping)
    return tuple(sorted(name for dtype, name in _NAMES.items() if dtype in found))
