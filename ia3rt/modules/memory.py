"""Whose memory the tensors of a model lie in: two parameters may be one, or two objects over the same numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Held(NamedTuple):
    """A parameter or buffer of a model.

    Attributes:
        module: what holds it.
        path: that module's.
        name: its name there.
        tensor: it.
    """

    module: nn.Module
    path: str
    name: str
    tensor: Tensor


class Memory:
    """Where all parameters and buffers of a model lie, as it is now.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = [
            (Held(module, path, name, tensor), _bytes_of(tensor))
            for path, module in model.named_modules()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        ]

    def others(self, module: nn.Module, name: str) -> list[Held]:
        """What else writing into a module's tensor would change: the same one elsewhere, or one over the same bytes.

        Views of one buffer or file that lie beside each other are apart, interleaved ones too.
        """
        tensor = module._parameters.get(name, module._buffers.get(name))
        if tensor is None:
            return []
        place = _bytes_of(tensor)
        return [
            held
            for held, other in self._places
            if (held.tensor is not tensor and _meet(tensor, place, held.tensor, other))
            or (held.tensor is tensor and held.module is not module)
        ]


def repeats(tensor: Tensor) -> bool:
    """Whether some of a tensor's elements are one place in memory, as `expand` makes them: it cannot be written."""
    place = _bytes_of(tensor)
    if place is None or _is_filled(tensor, place):
        return False
    marks = _marks(place[1], place[2], tensor)
    return int(marks.sum()) < tensor.numel()


_Bytes = tuple[torch.device, int, int]


def _bytes_of(tensor: Tensor) -> _Bytes | None:
    """Its device, and the addresses of its first byte and behind its last one; None where none are known."""
    if (
        type(tensor) not in (Tensor, nn.Parameter)
        or tensor.is_meta
        or not tensor.numel()
        or tensor.layout != torch.strided
    ):
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return tensor.device, begin, begin + (last + 1) * tensor.element_size()


def _is_filled(tensor: Tensor, place: _Bytes) -> bool:
    """Whether all bytes between its first and its last are its own: of a contiguous one, or its transpose."""
    return tensor.numel() * tensor.element_size() == place[2] - place[1] and 0 not in tensor.stride()


def _meet(one: Tensor, place: _Bytes | None, other: Tensor, there: _Bytes | None) -> bool:
    if place is None or there is None or place[0] != there[0] or place[1] >= there[2] or there[1] >= place[2]:
        return False
    if _is_filled(one, place) and _is_filled(other, there):
        return True
    size = one.element_size()
    if size != other.element_size() or (place[1] - there[1]) % size:
        return True
    begin, end = min(place[1], there[1]), max(place[2], there[2])
    return bool((_marks(begin, end, one) & _marks(begin, end, other)).any())


def _marks(begin: int, end: int, tensor: Tensor) -> Tensor:
    """Which of the elements between two addresses are a tensor's, bool."""
    size = tensor.element_size()
    marks = torch.zeros((end - begin) // size, dtype=torch.bool, device="cpu")
    shape = [1 if stride == 0 else length for length, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    marks.as_strided(shape, tensor.stride(), (tensor.data_ptr() - begin) // size).fill_(True)
    return marks
