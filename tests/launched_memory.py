"""What launches are given, told by whose memory a pointer is into and how far, wherever the allocator put it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Address(int):
    """Where a tensor begins; `memory` is where the memory does that it is part of."""

    memory: int

    def __add__(self, offset: int) -> Address:
        moved = Address(int(self) + offset)
        moved.memory = self.memory
        return moved


_held: list[object] = []
_data_ptr = Tensor.data_ptr


def watch_pointers() -> None:
    """Have every data_ptr() be an Address: by itself an int may be a pointer or a size."""

    def data_ptr(tensor: Tensor) -> Address:
        address = Address(_data_ptr(tensor))
        address.memory = memory_of(tensor)
        _held.append(tensor.untyped_storage())  # so that nothing else comes to lie there
        return address

    Tensor.data_ptr = data_ptr  # type: ignore[method-assign, assignment]


def watch_matmuls(launched: list[tuple]) -> None:
    """Add torch's matmuls into a tensor to the launches: they are some too."""
    from ia3rt.kernels import launch  # not before Triton's driver is another

    for op, multiply in list(launch._MULTIPLIES.items()):

        def watched(*tensors: Tensor, out: Tensor | None = None, multiply: Any = multiply) -> Tensor:
            if out is None:  # a layer's own
                return multiply(*tensors)
            laid_out = [(x, tuple(x.shape), x.stride()) for x in (*tensors, out)]
            launched.append((multiply.__name__, *[0] * 7, laid_out))
            return multiply(*tensors, out=out)

        launch._MULTIPLIES[op] = watched
        setattr(torch, multiply.__name__, watched)


def forget_pointers() -> None:
    """Let go of the memory of pointers so far: before what is looked at next."""
    _held.clear()


def memory_of(tensor: Tensor) -> int:
    """Where the memory begins that a tensor is part of."""
    return tensor.untyped_storage().data_ptr()


def told(value: object, names: Mapping[int, str], made: dict[int, str]) -> object:
    """A launch's arguments, or a part of them, without addresses.

    Args:
        value: as the launcher got it.
        names: of memory that is known, by where it begins.
        made: of other memory, in the order in which launches were first given it; added to.
    """
    if isinstance(value, Tensor):
        return told(value.data_ptr(), names, made)
    if type(value).__name__ == "TensorDescriptor":
        described = value.base, *value.shape, *value.strides, *value.block_shape  # type: ignore[attr-defined]
        return told(described, names, made)
    if isinstance(value, (tuple, list)):
        return [told(each, names, made) for each in value]
    if isinstance(value, Address):
        name = names.get(value.memory) or made.setdefault(value.memory, f"made {len(made)}")
        return [name, int(value) - value.memory]
    return value
