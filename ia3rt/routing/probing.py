"""How a model lays out the rows of its batch, layer by layer: seen once for each kind of input, then known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from ia3rt.adapters.bank import Bank
from ia3rt.routing.batch import has_text, is_media, media_inputs, row_inputs
from ia3rt.routing.forward import Forward, Part
from ia3rt.routing.layout import NOTHING, PICKED, TOKENS, WINDOWS, Layout, Unknown, layout_of
from ia3rt.routing.marks import Marks
from ia3rt.routing.traced import has_no_numbers, is_by_proxies, is_captured, is_recorded, is_traced, is_transformed
from ia3rt.routing.worn import Worn

_ELSEWHERE = "the rows are in another place of it than in an earlier call"
_CALL_BEFORE = "call the model once by itself within the route, with an input like this one, before it is transformed"

Layouts: TypeAlias = "dict[int, Layout | Unknown]"
"""By the number of dimensions of an input; by minus that, of a batch of one row, whose tokens wear different mixes."""


class Probing:
    """Of one model. A forward of rows that wear different mixes is the first of its kind once; it takes longer.

    Attributes:
        seen: how many forwards were looked at: what was known before another one may not be so after it.
    """

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._kinds: set[object] = set()
        self.seen = 0
        self._differ = False  # whether a layer has its rows in one place in a call, and in another one in the next
        self._by_shape = False  # whether how often rows are repeated somewhere depends on the batch's shape

    def is_first(self, forward: Forward, model: nn.Module, arguments: Mapping[str, Any], batch: Tensor | None) -> bool:
        """Whether a forward is to be followed: none of its kind was yet."""
        rows = forward.worn.rows
        if rows is None or batch is None or has_no_numbers(batch) or is_captured(batch) or is_by_proxies():
            return False
        is_row = rows == 1 and forward.worn.tokens is None
        # On a GPU, rows that are alike now may be captured next, for others.
        if (is_row or (len(forward.worn.route.mixes) < 2 and not batch.is_cuda)) and forward.most is None:
            return False
        shape = batch.shape[1:] if self._by_shape else None
        media = tuple(name for name in arguments if is_media(name) and arguments[name] is not None)
        forward.sees = bool(media)
        of_model = forward.part, media, _kind(model, arguments, batch, forward.worn.images)
        forward.kind = of_model, shape, rows == 1, forward.most is not None
        return self._differ or forward.kind not in self._kinds

    def follow(self, forward: Forward, arguments: Mapping[str, Any]) -> None:
        """Follows the last row of the batch through a forward, and the last of its images.

        That has another place in any order of them that a model may take, such as the reverse.

        Raises:
            ValueError: torch.func transforms the forward, so that nothing can be followed.
        """
        if is_transformed():
            _check_alike(forward)
            return
        rows, images = forward.worn.rows, forward.worn.images or ()
        assert rows is not None
        of_rows = () if forward.part is Part.IMAGES else row_inputs(arguments, rows)
        of_images = media_inputs(arguments, len(images)) if forward.part is Part.IMAGES or has_text(arguments) else ()
        marks, image_marks = Marks(rows), Marks(len(images))
        has_rows = [marks.mark(x, rows - 1) for x in of_rows]
        has_images = [image_marks.mark(x, len(images) - 1) for x in of_images]
        if not any(has_images if forward.part is Part.IMAGES else has_rows):
            return  # or what says nothing of the rows would be taken to say that nothing depends on them
        self.seen += 1
        forward.marks = marks
        marks.__enter__()  # type: ignore[no-untyped-call]
        if images:
            forward.image_marks = image_marks
            image_marks.__enter__()  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """Lets the next forward of each kind be looked at again, as layers came to wear something."""
        self._kinds.clear()

    def is_new(self, names: tuple[str, ...], is_of_one_row: bool) -> bool:
        """Whether a compiler asks for the first time of forwards with these inputs."""
        kind = "compiled", names, is_of_one_row
        if kind in self._kinds:
            return False
        self._kinds.add(kind)
        return True

    def end(self, forward: Forward, completed: bool) -> None:
        """Ends what `follow` began; what a forward of this kind does is known where it was completed."""
        for marks in (forward.image_marks, forward.marks):
            if marks is not None:
                marks.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if forward.marks is not None and completed:
            self._kinds.add(forward.kind)
        forward.marks = forward.image_marks = None

    def layout(self, layer: nn.Module, where: int | str, x: Tensor, worn: Worn, forward: Forward | None) -> Layout:
        """Where the rows are in an input of a layer, or in its output; `where` that is, is for the error.

        Raises:
            ValueError: it is not known.
        """
        layouts: Layouts = layer.ia3_layouts  # type: ignore[assignment]
        is_followed = forward is not None and forward.marks is not None and not is_traced() and not is_transformed()
        if is_followed and x.numel():  # what has no elements says nothing
            assert forward is not None
            here = _see(layouts, x, worn, forward)
            seen = layouts[_key(x, worn)]
            if isinstance(here, Layout) and isinstance(seen, Unknown):
                self._differ = True  # so each forward is looked at from now on, and what it shows is what holds in it
                return here
            self._by_shape = self._by_shape or (isinstance(seen, Layout) and seen.repeated not in (0, TOKENS))
        layout = layouts.get(_key(x, worn))
        if isinstance(layout, Layout) and worn.is_of_one_row:
            return layout
        if isinstance(layout, Layout):
            assert worn.route.index is not None
            # The index's size and not `worn.rows`: a compiler takes that for the size of a tensor, which may change.
            count = worn.route.index.shape[0] if not layout.images else len(worn.images or ())
            tokens = None if forward is None else forward.tokens
            if count and (layout.fits(x.shape, count, tokens) or (layout.images and count == 1)):
                return layout
            self._kinds.clear()
            what = "images, and it is known of {} which row has them" if layout.images else "rows, and there are {}"
            layout = Unknown(
                f"its dimension {layout.dim} went over the {what.format(count)}. Call the model again: the next "
                "forward is looked at anew"
            )
        if layout is None:
            self._kinds.clear()  # one that is reached by chance: the next forward is looked at again
        raise ValueError(self._refusal(where, x, layout, worn, forward))

    def is_known(self, layer: nn.Module, x: Tensor) -> bool:
        """Whether the layout of such an input was seen."""
        return isinstance(layer.ia3_layouts.get(x.dim()), Layout)  # type: ignore[operator, union-attr]

    def _refusal(self, where: int | str, x: Tensor, layout: Unknown | None, worn: Worn, forward: Forward | None) -> str:
        site = where if isinstance(where, str) else list(self._bank.sites.values())[where]
        if layout is None and forward is None and not is_traced():
            return (
                f"the rows wear different adapters, and {site} is reached outside of a call of the model, so that it "
                f"is not known whose each element of the tensor {tuple(x.shape)} is: call the model and not its "
                "forward (model(…), which runs hooks, not model.forward(…)) nor a part of it, or let all rows wear one "
                "mix (set_adapter)"
            )
        unseen = "no forward of rows with different adapters has reached it yet"
        if not is_traced() and is_transformed():
            unseen += f", and within torch.func's transforms none can be followed ({_CALL_BEFORE})"
        reason = layout.reason if layout else unseen
        may_say = layout is not PICKED and worn.images is None and (forward is None or forward.sees)
        first = "Call the model once in this route first, let" if layout is None and is_recorded() else "Let"
        told = "say which row each image belongs to (route(…, images=[…])), " if may_say else ""
        return (
            f"the rows wear different adapters, and it is not known whose each element of the tensor "
            f"{tuple(x.shape)} at {site} is: {reason}. {first} all rows wear one mix (set_adapter), {told}or leave the "
            "module out with patch(exclude_modules=…)"
        )


def _check_alike(forward: Forward) -> None:
    """Raises ValueError where a forward has to be followed, for its rows wear different mixes, or theirs from a start.

    Under torch.func, numbers are in tensors within others, of which operations show nothing to who looks on.
    """
    if len(forward.worn.route.mixes) > 1 or forward.most is not None:
        raise ValueError(
            "the rows wear different adapters, and in the first forward of its kind it is seen where the model has "
            "each of them, which cannot be while torch.func transforms it (grad, jvp, vmap, functionalize): "
            + _CALL_BEFORE
        )


def _see(layouts: Layouts, x: Tensor, worn: Worn, forward: Forward) -> Layout | Unknown:
    """What the marks say of an input, and notes it; what differs from what was seen before is not known."""
    assert worn.rows is not None and forward.marks is not None
    if worn.is_of_one_row:  # what depends on the text has its tokens, and what does not has others, as of an image
        text: Layout | Unknown = Layout(0, TOKENS) if forward.marks.marked(x).any() else NOTHING
        known = layouts.setdefault(_key(x, worn), text)
        layouts[_key(x, worn)] = text if known == text else NOTHING
        return layouts[_key(x, worn)]
    seen: Layout | Unknown = layout_of(forward.marks.marked(x), worn.rows, forward.tokens or 0)
    if isinstance(seen, Layout) and forward.marks.is_picked(x):  # unless all were
        seen = Layout(0, TOKENS) if len(x) == worn.rows * (forward.tokens or 0) else PICKED
    if isinstance(seen, Unknown) and forward.image_marks is not None and worn.images is not None:
        marked, count = forward.image_marks.marked(x), len(worn.images)
        of_images = layout_of(marked, count) if count > 1 else Layout(0) if marked.any() else seen
        if isinstance(of_images, Layout) and not of_images.repeated:
            seen = of_images._replace(images=True)
    before = layouts.get(x.dim(), seen)
    layouts[x.dim()] = seen if before == seen else _both(before, seen, forward.tokens)
    return seen


def _key(x: Tensor, worn: Worn) -> int:
    return -x.dim() if worn.is_of_one_row else x.dim()


def _both(before: Layout | Unknown, seen: Layout | Unknown, tokens: int | None) -> Layout | Unknown:
    """What is known of a layer's inputs, where an earlier one was laid out in another way."""
    if isinstance(before, Layout) and isinstance(seen, Layout):
        if before.repeated == TOKENS and seen == Layout(0) and tokens == 1:
            return before  # one token a row
        if before == Layout(0) and seen.repeated == TOKENS:
            return seen  # there was one token a row so far; where a row has one of many, this does not fit
        are_of_images = before.images or seen.images
        if before.dim == seen.dim == 0 and TOKENS not in (before.repeated, seen.repeated) and not are_of_images:
            return Layout(0, WINDOWS)
        return Unknown(_ELSEWHERE)
    layout, unknown = (before, seen) if isinstance(before, Layout) else (seen, before)
    # Of images nothing depends on the rows; which row has them may be known in one forward and not in the other.
    return layout if isinstance(layout, Layout) and layout.images and unknown == NOTHING else unknown


def _kind(model: nn.Module, arguments: Mapping[str, Any], batch: Tensor, images: Sequence[int] | None) -> object:
    """What forwards have in common that lay out their rows in one way."""
    names = tuple((name, x.dim()) for name, x in arguments.items() if isinstance(x, Tensor))
    return (
        type(model),
        names,
        images is not None and len(images),
        batch.dim() > 1 and batch.shape[1] == 1,
        model.training,
    )
