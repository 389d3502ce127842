"""Layers that other code made of several layers' weights, and calls in their place, past their vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def check_unfused(modules: Mapping[str, nn.Module], layers: Iterable[nn.Module]) -> None:
    """Sees to it that no layer beside has these layers' weights as a part of its own.

    Args:
        modules: the model's, by path.
        layers: layers that wear vectors and that a forward does not call, or of which that is not known.

    Raises:
        ValueError: one has.
    """
    paths = {module: path for path, module in modules.items()}
    for path in (paths[layer] for layer in layers if layer in paths):
        copy = _fused_copy(modules, path)
        if copy is not None:
            raise ValueError(
                f"the weight of {path!r} is a part of that of {copy!r} too, which other code made and calls in its "
                "place, past its vectors: take that back (in diffusers unfuse_qkv_projections(), and delete "
                f"{copy!r}), or leave the module out with patch(exclude_modules=…)"
            )


def _fused_copy(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """The path of a layer beside the one at `path` whose weight has a copy of that one's among its rows.

    As diffusers' fuse_qkv_projections() makes it. None where there is no such layer.
    """
    weight = _weight(modules[path])
    around, _, name = path.rpartition(".")
    if weight is None or not name:
        return None
    for other, module in modules[around].named_children():
        whole = _weight(module)
        if module is not modules[path] and whole is not None and _has_rows(whole, weight):
            return f"{around}.{other}".lstrip(".")
    return None


def _weight(layer: nn.Module) -> Tensor | None:
    weight = layer._parameters.get("weight") if isinstance(layer, nn.Linear) else None
    if type(weight) is not nn.Parameter or weight.dim() != 2 or weight.is_meta:
        return None
    return weight.detach()


def _has_rows(whole: Tensor, part: Tensor) -> bool:
    alike = (whole.dtype, whole.device, whole.shape[1]) == (part.dtype, part.device, part.shape[1])
    if not alike or len(whole) <= len(part) or not len(part) or bool((part == part[0, 0]).all()):  # ones are in any
        return False
    starts = (whole[: len(whole) - len(part) + 1] == part[0]).all(1).nonzero().flatten().tolist()
    return any(torch.equal(whole[start : start + len(part)], part) for start in starts)
