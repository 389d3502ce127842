"""Finds out which elements of an intermediate result depend on one row of the batch, while a forward runs.

Each operation of the forward is done twice: as it is, and on a twin in which that row's numbers are NaN. What is NaN in
the twin only depends on the row. The forward itself computes, returns and changes what it would; it takes about three
times as long, and is done once for each kind of input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

_WRITE_UNTOLD = frozenset({"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"})
"""Operations that write to their inputs, the running statistics, and do not declare it."""

_JOINING = torch.ops.aten.stack.default, torch.ops.aten.cat.default

_SWEEP = 256  # operations after which the twins of memory that was freed go


class Marks(TorchDispatchMode):
    """While it is entered, follows what depends on what was marked."""

    def __init__(self, rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rows = rows
        self._twins: dict[int, tuple[StorageWeakRef, torch.UntypedStorage]] = {}
        self._picked: dict[int, StorageWeakRef] = {}
        self._calls = 0

    def mark(self, x: Tensor, row: int) -> bool:
        """Marks a row of an input of the forward [rows, ...]; whether that is possible."""
        with _disable_current_modes():
            if not x.numel() or x.stride(0) == 0 or x.is_complex() or x.dtype == torch.bool or _address(x) is None:
                return False
            if x.is_floating_point() and bool(x[row].isnan().any()):
                return False
            twin = self._give_twin(x)
            if x.is_floating_point():
                twin[row] = torch.nan
            else:  # another number that is valid there, so that it can be looked up
                low, high = x.min(), x.max()
                other = torch.where(x[row] == high, low, high)
                twin[row] = other if low != high else (x[row] + 1 if int(high) == 0 else torch.zeros_like(x[row]))
            return True

    def marked(self, x: Tensor) -> Tensor:
        """Bool, as x: what depends on the row."""
        with _disable_current_modes():
            twin = self._twin(x)
            if twin is None:
                return torch.zeros(x.shape, dtype=torch.bool, device=x.device)
            x = x.detach()
            return twin.isnan() & ~x.isnan() if x.is_floating_point() else twin != x

    def is_picked(self, x: Tensor) -> bool:
        """Whether x has those elements of the batch that its numbers say, as those under a mask: others in the next."""
        at = _address(x)
        return at is not None and at in self._picked and not self._picked[at].expired()  # type: ignore[no-untyped-call]

    def carry(self, x: Tensor, y: Tensor) -> None:
        """Takes it that each place of y, [..., width], depends on that place of x, [..., features], and on no other.

        For what computes each token by itself, but takes tokens apart in an order that depends on them.
        """
        with _disable_current_modes(), torch.no_grad():
            places = self.marked(x).any(-1)
            self._give_twin(y)[places] = torch.nan

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Does an operation, and before it the same on the twins of its inputs, if any of them has one."""
        kwargs = kwargs or {}
        if any(each.__module__.startswith("torch.distributed.") for each in types):
            return NotImplemented  # such a tensor does it with what is in this process, and that is followed
        self._calls += 1
        if self._calls % _SWEEP == 0:
            self._twins = {at: twin for at, twin in self._twins.items() if not twin[0].expired()}  # type: ignore[no-untyped-call]
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        marked = [each for each in inputs if self._has_twin(each)]
        if not marked:
            result = func(*args, **kwargs)
            self._note_picked(func, inputs, tree_leaves(result))
            return result
        # Where numbers depend on the row, the choices that are made by them (the k largest, which are not 0) stay those
        # of the forward: a twin that goes another way says nothing of it.
        by_numbers = any(each.is_floating_point() for each in marked)
        if func._schema.is_mutable or func.overloadpacket.__name__ in _WRITE_UNTOLD:
            for each in inputs:
                if not self._has_twin(each) and _address(each) is not None:
                    self._give_twin(each)

        def twin_of(each: Any) -> Any:
            choice = by_numbers and not func._schema.is_mutable
            if not isinstance(each, Tensor) or (choice and not each.is_floating_point()):
                return each
            twin = self._twin(each)
            return each if twin is None else twin

        twins = None
        with suppress(Exception), _same_draws(func, inputs):
            twins = _waited(func, tree_leaves(func(*tree_map(twin_of, args), **tree_map(twin_of, kwargs))))
        result = func(*args, **kwargs)
        if self._orders_rows(func, args):
            # By what is in this batch: no order that the next one has. So all of it depends on any row.
            other = (
                torch.nan
                if result.is_floating_point()
                else torch.where(result == result.max(), result.min(), result.max())
            )
            self._give_twin(result).copy_(torch.as_tensor(other, device=result.device))
            return result
        results = tree_leaves(result)
        self._note_picked(func, inputs, results)
        if twins is not None and len(twins) == len(results):
            for out, twin in zip(results, twins, strict=True):
                if isinstance(out, Tensor) and isinstance(twin, Tensor):
                    self._note(out, twin, by_numbers)
        return result

    def _orders_rows(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether an operation takes the rows in an order that is computed, or of which only this batch says that it is
        another one: the last row may stay in its place."""
        if func in _JOINING:
            return self._joins_rows(*args)
        if func is torch.ops.aten.index_select.default or func is torch.ops.aten.gather.default:
            x, dim, index = args[:3]
        elif func is torch.ops.aten.index.Tensor and len(args[1]) == 1:
            (x, (index,)), dim = args, 0
        else:
            return False
        by_element = func is torch.ops.aten.gather.default
        ordered = x.dim() > 1 and len(x) == self._rows == (len(index) if by_element else index.numel())
        ordered = ordered and dim == 0 and not index.is_floating_point() and index.dtype != torch.bool
        return bool(ordered and any(self.marked(each).any() for each in (x, index)))

    def _joins_rows(self, parts: list[Tensor], dim: int = 0) -> bool:
        """Whether single rows of one tensor are put one after another in another order than there."""
        if dim != 0 or len(parts) != self._rows or len({_address(each) for each in parts}) > 1:
            return False
        places = [each.storage_offset() for each in parts]
        return places != sorted(places) and sum(bool(self.marked(each).any()) for each in parts) == 1

    def _note_picked(self, func: Any, inputs: list[Tensor], results: list[Any]) -> None:
        """Notes which results are picked: what is made of such, or how many there are depends on numbers.

        What is put back among all others has its place there, and so has what a model lays out by row again, which
        says that each has as many.
        """
        picked = [each for each in inputs if self.is_picked(each)]
        picks = torch.Tag.dynamic_output_shape in func.tags
        if func is torch.ops.aten.index.Tensor:
            picks = any(each.dtype == torch.bool or self.is_picked(each) for each in inputs[1:])
        if not picked and not picks:
            return
        held = {_address(each) for each in inputs}
        for out in results:
            if not isinstance(out, Tensor) or not out.dim():
                continue
            at = _address(out)
            if at in held:  # a view, or written in place
                if any(self._are_by_row(each, out) for each in picked):
                    self._picked.pop(at, None)  # type: ignore[arg-type]
            elif at is not None and (picks or self._is_of(picked, out, inputs)):
                self._picked[at] = StorageWeakRef(out.untyped_storage())  # type: ignore[no-untyped-call]

    def _are_by_row(self, picked: Tensor, out: Tensor) -> bool:
        """Whether a view has a dimension more than what was picked, and the rows in the first."""
        of_tokens = picked.dim() > 1 or not picked.is_floating_point()  # else single numbers, as masked_select gives
        return of_tokens and len(out) == self._rows and out.dim() > picked.dim()

    def _is_of(self, picked: list[Tensor], out: Tensor, inputs: list[Tensor]) -> bool:
        """Whether a result has as many as what was picked, and none of its inputs that depends on the row has it so."""
        alike = [each for each in inputs if each.dim() and len(each) == len(out)]
        among = (each for each in alike if self._has_twin(each))
        return any(each.dim() and len(each) == len(out) for each in picked) and all(map(self.is_picked, among))

    def _note(self, out: Tensor, twin: Tensor, by_numbers: bool) -> None:
        """Keeps the twin of a result."""
        if self._has_twin(out) or _address(out) is None or out.is_nested != twin.is_nested:
            return  # a view of what has one, or written in place
        if out.is_nested:
            storage = out.untyped_storage()
            self._twins[storage.data_ptr()] = StorageWeakRef(storage), twin.untyped_storage()  # type: ignore[no-untyped-call]
            return
        if out.shape != twin.shape:
            return
        if out.is_floating_point():
            self._give_twin(out).copy_(twin if by_numbers else torch.where(twin == out, out, torch.nan))
        elif not by_numbers and not out.is_complex():
            self._give_twin(out).copy_(twin)

    def _has_twin(self, x: Tensor) -> bool:
        at = _address(x)
        if at is None or at not in self._twins:
            return False
        if self._twins[at][0].expired():  # type: ignore[no-untyped-call]  # the address is another's now
            del self._twins[at]
            return False
        return True

    def _twin(self, x: Tensor) -> Tensor | None:
        if not self._has_twin(x):
            return None
        storage = self._twins[x.untyped_storage().data_ptr()][1]
        with torch.no_grad():
            empty = torch.empty(0, dtype=x.dtype, device=x.device)
            if x.is_nested:
                sizes = x._nested_tensor_size(), x._nested_tensor_strides(), x._nested_tensor_storage_offsets()
                return torch._nested_view_from_buffer(empty.set_(storage), *sizes)
            return empty.set_(storage, x.storage_offset(), x.size(), x.stride())

    def _give_twin(self, x: Tensor) -> Tensor:
        """A twin of all of x's memory, so that views of it are views of the twin."""
        storage = x.untyped_storage()
        self._twins[storage.data_ptr()] = StorageWeakRef(storage), storage.clone()  # type: ignore[no-untyped-call]
        twin = self._twin(x)
        assert twin is not None
        return twin


def _waited(func: Any, results: list[Any]) -> list[Any]:
    """The results of an operation; one between processes gives them before they are there."""
    if func.namespace == "_c10d_functional":
        return [torch.ops._c10d_functional.wait_tensor(each) if isinstance(each, Tensor) else each for each in results]
    for each in results if func.namespace == "c10d" else ():
        if isinstance(each, torch.ScriptObject):
            each.wait()  # type: ignore[attr-defined]
    return results


def _address(x: Tensor) -> int | None:
    """Where x's memory is; None where it has none that is its own."""
    try:
        return x.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None


@contextmanager
def _same_draws(func: Any, inputs: list[Tensor]) -> Iterator[None]:
    """Lets what is drawn at random inside be drawn again after it."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        yield
        return
    devices = {each.get_device() for each in inputs if each.is_cuda}
    with torch.random.fork_rng(devices):
        yield
