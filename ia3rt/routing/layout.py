"""Where the rows of the batch are in the input of a layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TOKENS = -1
WINDOWS = -2


class Layout(NamedTuple):
    """Whose the elements of an input [..., width] are.

    Attributes:
        dim: the dimension that goes over the rows.
        repeated: how many neighbours each row has there; 0 for none, TOKENS for one a token of the batch, and WINDOWS
            for as many as the size of the batch makes.
        images: whether it goes over the images of the batch, and not over its rows.
    """

    dim: int
    repeated: int = 0
    images: bool = False

    def fits(self, shape: torch.Size, rows: int, tokens: int | None) -> bool:
        """Whether an input of this shape has so many rows there, in a batch of so many tokens a row."""
        if self.repeated == WINDOWS or (self.repeated == TOKENS and tokens is None):
            return shape[self.dim] % rows == 0
        each = tokens if self.repeated == TOKENS else self.repeated or 1
        return shape[self.dim] == rows * (each or 1)


class Unknown(NamedTuple):
    """Why it is not known whose the elements of an input are; the end of a sentence about it."""

    reason: str


NOTHING = Unknown("nothing in it depends on the rows of the batch one by one")
PICKED = Unknown("it has those tokens that a mask of this batch picks, as many of each row as it says")


def layout_of(marked: Tensor, rows: int, tokens: int = 0) -> Layout | Unknown:
    """The layout of an input, of which the elements are marked that depend on the last row.

    Args:
        marked: bool [..., width].
        rows: how many there are.
        tokens: how many tokens each has in the batch.
    """
    row, places = rows - 1, marked.any(-1)
    count = int(places.sum())
    if count == 0:
        return NOTHING
    found = [
        Layout(dim)
        for dim, size in enumerate(places.shape)
        if size == rows and int(places.select(dim, row).sum()) == count
    ]
    if places.dim() and places.shape[0] % rows == 0 and places.shape[0] > rows:
        each = places.shape[0] // rows
        if int(places[row * each : (row + 1) * each].sum()) == count:
            found.append(Layout(0, TOKENS if each == tokens else each))
        if int(places[row::rows].sum()) == count:
            found.append(Layout(-1))  # one after another, again and again: no layout that is known
    if len(found) == 1 and found[0].dim >= 0:
        return found[0]
    if count == places.numel():
        return Unknown("each of its elements depends on several rows of the batch")
    if len(found) > 1:
        return Unknown("its shape fits several orders of the rows")
    return Unknown("the rows of the batch are not one after another in it")
