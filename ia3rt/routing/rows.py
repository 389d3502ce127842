"""Scales for rows that wear different mixes, laid out as what they are multiplied to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from ia3rt.adapters.bank import Bank
from ia3rt.routing.forward import Forward
from ia3rt.routing.layout import Layout
from ia3rt.routing.probing import Probing
from ia3rt.routing.traced import has_no_numbers, is_captured, is_traced
from ia3rt.routing.worn import Shelf, Worn


class RowScales:
    """Of one model.

    Args:
        bank: the adapters.
        probing: how the model lays out its rows.
        shelf: makes what is worn.
        forward: gives the forward at hand.
    """

    def __init__(self, bank: Bank, probing: Probing, shelf: Shelf, forward: Callable[[], Forward | None]) -> None:
        self._bank = bank
        self._probing = probing
        self._shelf = shelf
        self._forward = forward

    def scale(self, layer: nn.Module, position: int, x: Tensor, worn: Worn) -> Tensor | None:
        """The scale of a layer's input or output, as it is multiplied to it.

        Args:
            layer: the module that the vector acts at.
            position: of the site in the bank.
            x: [..., width], what is scaled.
            worn: what the rows wear.

        Returns:
            What broadcasts over x; None where no adapter of the route acts.

        Raises:
            ValueError: it is not known whose each element of x is.
        """
        forward = self._forward()
        key = position, x.dim(), self._probing.seen
        if not is_traced() and (forward is None or forward.marks is None) and key in worn.spread:
            dim, scale = worn.spread[key]
            if x.shape[dim] == worn.rows:
                return scale  # as in each step of decoding: the rest would take longer than the multiplication
        if not self._is_scaled(layer, position, x, worn, forward):
            return None
        self._shelf.composes = True  # from now on; the kernels need no composed mixes
        worn.compose(self._bank)
        scale = worn.composed.scale(position)
        if scale.dim() < 2:
            return scale
        if has_no_numbers(x) or self._need_no_order(layer, x, worn, forward):
            return scale[0]
        layout = self._probing.layout(layer, position, x, worn, forward)
        laid = spread(scale, layout, x, worn)
        if worn.memory is not None and not layout.repeated and not layout.images and not is_traced():
            worn.spread[key] = layout.dim, laid
        return laid

    def numbered(self, layer: nn.Module, position: int, x: Tensor, worn: Worn) -> tuple[Tensor, Tensor | None] | None:
        """The scales of a site for who takes the elements of x apart, as experts do with tokens.

        Args:
            layer: the module that the vector acts at.
            position: of the site in the bank.
            x: [..., features], an input of the layer.
            worn: what the rows wear.

        Returns:
            Scales [n, width], and which of them each place of x wears, int64 [places]; None for the first everywhere.
            None instead of both where no adapter of the route acts.

        Raises:
            ValueError: it is not known whose each element of x is.
        """
        if not worn.by_row:
            acts = is_traced() or is_captured(x) or worn.acts_at(position, self._bank)
            return (worn.composed.scale(position).unsqueeze(0), None) if acts else None
        forward = self._forward()
        if not self._is_scaled(layer, position, x, worn, forward):
            return None
        worn.compose(self._bank)
        scale = worn.composed.scale(position)
        if scale.dim() < 2 or has_no_numbers(x) or self._need_no_order(layer, x, worn, forward):
            return scale.reshape(-1, scale.shape[-1])[:1], None
        layout = self._probing.layout(layer, position, x, worn, forward)
        return scale, _numbers(scale, layout, x, worn)

    def are_major(self, layer: nn.Module, position: int, x: Tensor, worn: Worn) -> bool:
        """Whether the elements of x lie row by row, or token by token, as the kernels read them, and are scaled.

        Raises:
            ValueError: it is not known.
        """
        forward = self._forward()
        key = position, x.dim(), self._probing.seen
        may_know = not is_traced() and (forward is None or forward.marks is None)
        if may_know and key in worn.major and x.shape[0] == worn.rows:
            return True  # as in each step of decoding: the rest would take longer than a launch
        if not self._is_scaled(layer, position, x, worn, forward):
            return False
        if has_no_numbers(x) or self._need_no_order(layer, x, worn, forward):
            return True
        layout = self._probing.layout(layer, position, x, worn, forward)
        if layout.dim != 0 or layout.images:
            return False
        if worn.length is not None:
            return x.shape[:-1].numel() == (worn.rows or 0) * worn.length
        if not layout.repeated and not is_traced():
            worn.major.add(key)
        return True

    def layout(self, module: nn.Module, where: str, x: Tensor, worn: Worn) -> Layout:
        """Where the rows of the forward at hand are in x, an input of `module`.

        Raises:
            ValueError: it is not known.
        """
        return self._probing.layout(module, where, x, worn, self._forward())

    def carry(self, x: Tensor, y: Tensor) -> None:
        """Says that each place of y depends on that place of x alone, in a forward that is looked at."""
        forward = self._forward()
        for marks in () if forward is None else (forward.marks, forward.image_marks):
            if marks is not None:
                marks.carry(x, y)

    def see(self, module: nn.Module, where: int | str, x: Tensor, worn: Worn) -> None:
        """Sees where they are, in a forward that is looked at; what is not known there is an error when it is asked."""
        forward = self._forward()
        if forward is not None and forward.marks is not None and x.numel():
            with suppress(ValueError):
                self._probing.layout(module, where, x, worn, forward)

    def _is_scaled(self, layer: nn.Module, position: int, x: Tensor, worn: Worn, forward: Forward | None) -> bool:
        """Whether an adapter of the route acts; what x says of the rows is seen before that."""
        if worn.route.by_token and worn.tokens is None:
            if not worn.acts_at(position, self._bank):
                return False
            site = list(self._bank.sites.values())[position]
            raise ValueError(
                f"each token wears a mix of its own, and {site} is called outside of a forward of the model over text, "
                "so that it is not known which tokens these are: call the model, or route rows"
            )
        self.see(layer, position, x, worn)
        if forward is not None and forward.most is not None and forward.marks is not None:
            self._check_places(position, x, worn, forward)
        # What is compiled or captured runs for other adapters too: it multiplies by the ones of a site where none acts.
        # So does, on a GPU, the first forward of its kind, so that nothing is done for the first time in a capture.
        is_first = x.is_cuda and forward is not None and forward.marks is not None
        is_for_others = is_first or is_traced() or is_captured(x)
        return (is_for_others and self._probing.is_known(layer, x)) or worn.acts_at(position, self._bank)

    def _check_places(self, position: int, x: Tensor, worn: Worn, forward: Forward) -> None:
        """Raises ValueError where a layer computes on tokens of the cache again, which came before the rows' starts."""
        if forward.most is None or x.shape[:-1].numel() <= forward.most:
            return
        if not worn.acts_at(position, self._bank):
            forward.kind = object()  # another adapter may act there: the next forward is looked at again
            return
        site = list(self._bank.sites.values())[position]
        raise ValueError(
            f"the rows wear their mixes from a start on, and {site} got {tuple(x.shape[:-1])} where the batch has "
            f"{forward.most} tokens: the model computes there on the tokens of its cache again, which would wear the "
            "mixes too. Run the whole prompt without a cache (use_cache=False), route rows without start, or leave the "
            "module out with patch(exclude_modules=…)"
        )

    def _need_no_order(self, layer: nn.Module, x: Tensor, worn: Worn, forward: Forward | None) -> bool:
        """Whether rows that all wear the same mix are scaled as one; what runs for others too does as for others.

        So is what has no elements, as of a part of the model that a batch has nothing for.
        """
        if not is_traced() and not x.numel():
            if forward is not None and forward.marks is not None and not self._probing.is_known(layer, x):
                forward.kind = object()  # the next forward may have elements there, and is looked at again
            return True
        if worn.is_of_one_row and worn.tokens is None:
            return True
        if is_traced() and self._probing.is_known(layer, x):
            return False
        return len(worn.route.mixes) == 1 and not is_captured(x)


def _numbers(scale: Tensor, layout: Layout, x: Tensor, worn: Worn) -> Tensor:
    """Which of the scales each place of x wears, int64 [places]: what `spread` lays out, of their numbers."""
    numbers = torch.arange(len(scale), device=scale.device).unsqueeze(1)
    return spread(numbers, layout, x, worn).expand(*x.shape[:-1], 1).reshape(-1)


def spread(scale: Tensor, layout: Layout, x: Tensor, worn: Worn) -> Tensor:
    """Lays scales out as x is.

    Args:
        scale: [rows, width]; [mixes, width] where each token has a mix.
        layout: where the rows are in x.
        x: [..., width].
        worn: what the rows wear.

    Returns:
        What broadcasts over x.

    Raises:
        ValueError: tokens have mixes, and x does not have these tokens.
    """
    shape = [1] * x.dim()
    shape[-1] = scale.shape[-1]
    if worn.tokens is not None:
        rows, length = worn.rows or 0, worn.length or 0
        is_major = layout.dim == 0 and x.shape[:-1].numel() == rows * length
        if layout.images or not (is_major or (layout.dim == 1 and x.shape[:-1] == (length, rows))):
            raise ValueError(
                f"the tokens of a row wear different mixes, and a layer got {tuple(x.shape[:-1])} where the batch has "
                f"{rows} × {length}: in an image, or where there are more or fewer, no token is known. Route rows, or "
                "leave the module out with patch(exclude_modules=…)"
            )
        by_token = scale.index_select(0, worn.tokens)
        if is_major:  # token by token, whatever stands between: [rows, 1, length, width] too
            return by_token.view(*x.shape[:-1], -1)
        return by_token.view(rows, length, -1).transpose(0, 1)
    if layout.images:
        scale = scale[list(worn.images or ())]
        if len(scale) == 1:
            return scale[0]
    elif layout.repeated:
        scale = scale.repeat_interleave(x.shape[0] // scale.shape[0], 0)
    shape[layout.dim] = scale.shape[0]
    return scale.view(shape)
