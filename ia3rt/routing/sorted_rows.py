"""Callers that put rows in an order of their own before they call the model: sentence-transformers' encode."""

from __future__ import annotations

import sys

_PACKAGE = "sentence_transformers"
_SORT = ("encode", "predict")
"""Its methods that sort what they are given by length, to pad less."""


def check_unsorted() -> None:
    """Sees to it that the rows of the forward that begins are in the order in which its user gave them.

    Raises:
        ValueError: they were sorted.
    """
    frame = sys._getframe() if _PACKAGE in sys.modules else None
    while frame is not None:
        name = frame.f_code.co_name
        if name in _SORT and str(frame.f_globals.get("__name__")).partition(".")[0] == _PACKAGE:
            raise ValueError(
                f"the rows wear different adapters, and {_PACKAGE}' {name}() sorts what it is given by length, so that "
                f"the rows of its batches are not the route's: {name}() the texts of each adapter by themselves, with "
                "set_adapter(), or call the model with their features"
            )
        frame = frame.f_back
