"""What is worn over the batch of a forward: its rows, its tokens, and its images."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ia3rt.adapters.bank import Bank
from ia3rt.adapters.outside_modes import outside_modes
from ia3rt.routing.batch import cached, has_text, is_media, is_text, takes_text
from ia3rt.routing.context import Context
from ia3rt.routing.forward import Part
from ia3rt.routing.images import images_of
from ia3rt.routing.sorted_rows import check_unsorted
from ia3rt.routing.start import check_no_other_sequence, check_one_sequence
from ia3rt.routing.worn import Worn


class Batches:
    """Of the forwards of one model.

    Args:
        model: the whole one.
        bank: the adapters.
        context: what this thread or task wears.
    """

    def __init__(self, model: nn.Module, bank: Bank, context: Context) -> None:
        self._model = weakref.ref(model)
        self._bank = bank
        self._context = context

    def part(self, model: nn.Module, arguments: Mapping[str, Any]) -> Part:
        """What of the whole model's forward one of `model` is."""
        whole = self._model()
        beside_text = whole is not None and whole is not model and takes_text(whole) and not has_text(arguments)
        return Part.IMAGES if beside_text and any(map(is_media, arguments)) else Part.WHOLE

    def over(
        self, model: nn.Module, worn: Worn, arguments: Mapping[str, Any], batch: Tensor | None, part: Part
    ) -> Worn:
        """`worn` over the rows, tokens and images at hand."""
        if part is Part.IMAGES:
            if worn.images is None and batch is not None and len(batch) == worn.rows:
                return worn.with_images(range(len(batch)))  # one a row, as the route does not say whose they are
            return worn
        self.check_rows(worn, batch)
        if len(worn.route.mixes) > 1:
            check_unsorted()
        if batch is None:
            return worn
        if worn.route.by_token and part is Part.WHOLE:
            check_one_sequence(model)
            check_no_other_sequence(batch, arguments)
            worn = self._over_tokens(model, worn, batch, arguments)
        images = images_of(model, arguments) if worn.images is None else None
        return worn if images is None else worn.with_images(images)

    def check_rows(self, worn: Worn, batch: Tensor | None) -> None:
        """Raises ValueError where the route has other rows than the batch."""
        index = worn.route.index
        if batch is not None and index is not None and batch.shape[0] != index.shape[0]:
            raise ValueError(
                f"the route has {index.shape[0]} rows, but the batch has {batch.shape[0]}: "
                "route() takes one mix for each row of the batch, set_adapter() one for all"
            )

    @outside_modes
    def _over_tokens(self, model: nn.Module, worn: Worn, batch: Tensor, arguments: Mapping[str, Any]) -> Worn:
        route = worn.route
        assert route.index is not None
        if route.start is not None and not is_text(batch, arguments):
            if model is not self._model():
                return worn  # the part that sees, as generate() runs it ahead: an error where a vector acts in it
            raise ValueError(
                f"the route has a start, and the batch {tuple(batch.shape)} of {batch.dtype} is no text, of which "
                "tokens can be counted: ids [rows, tokens], or vectors [rows, tokens, width]. Route rows without start"
            )
        length = batch.shape[1]
        past = self._tokens_before(arguments, length)
        if route.start is None:
            width = route.index.shape[1]
            if past == 0 and length != width and not self._context.wearing.generates:
                raise ValueError(f"the route has {width} tokens a row, but the batch has {length}")
        elif self._bank.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "the route has a start, and a captured CUDA graph does not know at which tokens it is replayed: "
                "capture it under a route without start, for tokens that come after it"
            )
        elif past + length <= int(route.start.min()):
            assert worn.before_start is not None
            return worn.before_start
        elif past >= int(route.start.max()):
            assert worn.after_start is not None
            return worn.after_start
        return worn.by_token(route.tokens(past, length).reshape(-1), length, self._bank)

    def _tokens_before(self, arguments: Mapping[str, Any], length: int) -> int:
        """How many tokens of each row came before the forward's, of which there are `length`."""
        past, wearing = cached(arguments), self._context.wearing
        if past is None and wearing.generates and arguments.get("mems") is None:
            past = wearing.seen  # XLNet alone goes over the last tokens twice
        if past is None:
            raise ValueError(
                "each token wears a mix of its own, and what the model keeps of the tokens before this forward does "
                "not say how many they were: for those that come after the start of all rows, route rows (route(…) "
                "without start or index)"
            )
        if wearing.generates:
            wearing.seen = past + length
        return past
