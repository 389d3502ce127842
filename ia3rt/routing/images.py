"""Which row of the batch each image belongs to, where the batch says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ia3rt.routing.batch import has_text, is_media

_TOKENS = ("image_token_id", "image_token_index")  # what stands for a piece of an image in the text


def images_of(model: nn.Module, arguments: Mapping[str, Any]) -> list[int] | None:
    """The row of each image beside text; None where there is none, or where it cannot be told.

    The text of a row has a place for each piece of its images, and the images stand in the order of the rows. So as
    many images as rows that have one are one each; and where all images have as many pieces, their number says it.
    """
    ids, pixels = arguments.get("input_ids"), _pixels(arguments)
    config = getattr(model, "config", None)
    token = next((getattr(config, name) for name in _TOKENS if isinstance(getattr(config, name, None), int)), None)
    if not has_text(arguments) or pixels is None or token is None or not isinstance(ids, Tensor) or ids.is_meta:
        return None
    count, pieces = len(pixels), (ids == token).sum(1).tolist()
    if sum(1 for each in pieces if each) == count:
        return [row for row, each in enumerate(pieces) if each]
    if count == 0 or sum(pieces) % count:
        return None
    of_one = sum(pieces) // count
    if of_one == 0 or any(each % of_one for each in pieces):
        return None
    return [row for row, each in enumerate(pieces) for _ in range(each // of_one)]


def _pixels(arguments: Mapping[str, Any]) -> Tensor | None:
    """The images, [images, …, height, width]."""
    if any("sizes" in name or "grid" in name for name in arguments):
        return None  # of which some have more pieces than others
    found = [x for name, x in arguments.items() if is_media(name) and isinstance(x, Tensor) and x.dim() >= 4]
    return found[0] if len(found) == 1 else None
