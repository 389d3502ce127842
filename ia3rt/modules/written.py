"""Whether what a merge wrote stands there still: other code may write weights, or put others in their place."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by the size of an element; of longer ones int64


class Written:
    """A tensor of a model, made right after it was written.

    `model.to(…)`, which moves or casts it, is no change, and neither is the same content, as a checkpoint of the merged
    model puts it there. Buffers are let be, as forwards write them.

    Args:
        path: the layer's or module's that the merge is of, for errors.
        module: what holds the tensor.
        name: its name there.
    """

    def __init__(self, path: str, module: nn.Module, name: str) -> None:
        self.path = path
        self._module, self._name = module, name
        tensor = module._parameters.get(name)
        self._tensor = None if tensor is None else weakref.ref(tensor)
        if tensor is not None:
            self._version = _version(tensor)
            self._content = _content(tensor)

    def stands(self, modules: Collection[nn.Module]) -> bool:
        """Whether it is in the model still, as it was written.

        Args:
            modules: the model's.
        """
        if self._module not in modules:
            return False
        if self._tensor is None:
            return True
        now = self._module._parameters.get(self._name)
        if now is None or now.shape != self._content[0]:
            return False
        return self._is_unwritten(now) or _are_alike(_content(now), self._content)

    def _is_unwritten(self, now: Tensor) -> bool:
        """Whether nobody wrote there, as far as torch counts it: what is written by way of `.data` it does not."""
        assert self._tensor is not None
        return now is self._tensor() and _version(now) == self._version

    def __deepcopy__(self, memo: dict[int, Any]) -> Written:
        """Of a copied model: torch counts from the start in a copied tensor."""
        made = memo[id(self)] = copy.copy(self)
        made._module = copy.deepcopy(self._module, memo)
        tensor = None if self._tensor is None else self._tensor()
        if tensor is not None:
            copied = copy.deepcopy(tensor, memo)
            made._tensor = weakref.ref(copied)
            if self._is_unwritten(tensor):
                made._version = _version(copied)
        return made


def _version(tensor: Tensor) -> int | None:
    """How often it was written; None where torch does not count that."""
    return None if tensor.is_inference() else tensor._version


def _content(tensor: Tensor) -> tuple[torch.Size, torch.dtype, Tensor]:
    """What tells its content: the sums of its rows' bits, as a copy would take as much memory as it."""
    size = tensor.element_size()
    bits = tensor.detach().view(_BITS.get(size, torch.int64))
    return tensor.shape, tensor.dtype, bits.sum(-1, dtype=torch.int64 if size > 4 else torch.int32).to("cpu")


def _are_alike(now: tuple[torch.Size, torch.dtype, Tensor], before: tuple[torch.Size, torch.dtype, Tensor]) -> bool:
    return now[:2] == before[:2] and torch.equal(now[2], before[2])
