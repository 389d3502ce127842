"""What is checked of a start: the token of each row from which on it wears its mix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

from torch import Tensor, nn

from ia3rt.routing.batch import is_of_rows
from ia3rt.routing.listed import listed

_FAR = 2**62
"""Behind any token, and a number of int64."""


def check_start(start: object, rows: int, by_token: bool, images: object) -> list[int]:
    """The first position that each row's mix is worn at; None and a number for all rows are written out.

    Raises:
        ValueError: `start` is no such position for each row, or the route says in another way what tokens wear.
    """
    if by_token:
        raise ValueError(
            "start says from which token on a row wears its mix, and an index [batch, tokens] says it of each token: "
            "give one of them"
        )
    if images is not None:
        raise ValueError(
            "start counts the tokens of a row, and images have none: give start or images. To let the base model see "
            "an image, run the part of the prompt with the image without a route, and go on with its cache"
        )
    given = listed(start)
    given = [given] * rows if hasattr(given, "__index__") else given
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(
            f"start must be the position of a token, or a list with one or None for each row: got {start!r}"
        )
    if len(given) != rows:
        raise ValueError(
            f"start has {len(given)} positions, and the route {rows} rows: give one for each row, or a number for all"
        )
    for row, each in enumerate(given):
        if each is not None and not _is_position(each):
            raise ValueError(
                f"start has {each!r} for row {row}: it must be the position of a token, 0 or more, or None for 0"
            )
    return [0 if each is None else min(int(each), _FAR) for each in given]


def _is_position(given: Any) -> bool:
    try:
        return not isinstance(given, bool) and index(given) >= 0
    except TypeError:
        return False


def check_one_sequence(model: nn.Module) -> None:
    """Raises ValueError where a model has two sequences of tokens, so that a token's position does not say which."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"each token wears a mix of its own, and {type(model).__name__} has two sequences of tokens, an encoder's "
            "and a decoder's: route rows"
        )


def check_no_other_sequence(batch: Tensor, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError where an input beside the text has as many places, which would be taken for its tokens.

    As what a model attends to besides. Where it is longer or shorter, what is made of it is no tokens by its size.
    """
    for name, value in arguments.items():
        is_other = isinstance(value, Tensor) and value is not batch and is_of_rows(name)
        if is_other and value.is_floating_point() and value.dim() == 3 and value.shape[:2] == batch.shape[:2]:
            raise ValueError(
                f"each token wears a mix of its own, and {name} {tuple(value.shape)} has as many places as the text "
                "has tokens, so that no layer can tell them from those: route rows (route(…) without start or index)"
            )
