"""Attentions of a known form, whose projections' vectors are applied where the rotary embedding is.

The rotary embedding reads and writes q and k anyway, so vectors cost no pass of their own, whatever the projections are
made of: quantised ones too. And one launch takes the place of the dozen operations of transformers' embedding.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ia3rt import ops
from ia3rt.modules.bare import linear
from ia3rt.modules.layer import IA3Layer, is_as_patched
from ia3rt.modules.prepared import Prepared, can_prepare
from ia3rt.modules.qkv_forms import Form, form_of_class, original_forward
from ia3rt.modules.set_forward import is_reached
from ia3rt.modules.wearer import How, Wearer, computing_tensor, original_class
from ia3rt.routing.worn import Worn

_Positions = tuple[int | None, ...]
"""Of the projections' vectors in the bank; None where one has none."""


class IA3QKV(Wearer):
    """An attention of a known form: its projections' vectors are applied where q and k are rotated.

    It is a short way, and the projections themselves wear the vectors: where anything stands in between at a call, such
    as a hook on a projection, the attention's own forward runs, and the projections scale their outputs.

    Attributes:
        ia3_form: the form, of the drop-in class.
        ia3_known: the original class's forward, and the rotary embedding that it calls, as they were recognised.
        ia3_module: the module that its forward is from, and finds the attention functions in.
        ia3_angles: where among that forward's arguments cos and sin are.
        ia3_prepared: the launch of the rotary embedding, as long as the bank stays.
    """

    ia3_form: ClassVar[Form | None]
    ia3_known: ClassVar[tuple[Any, Any]]
    ia3_module: ClassVar[Any]
    ia3_angles: ClassVar[int]
    ia3_prepared: Prepared | None = None

    def __init_subclass__(cls) -> None:
        """Recognises the form once, when the drop-in class is made."""
        super().__init_subclass__()
        original: Any = original_class(cls)
        forward = original_forward(original)
        cls.ia3_form = form_of_class(original)
        cls.ia3_module = None if forward is None else sys.modules[forward.__module__]
        if cls.ia3_form is not None:
            cls.ia3_angles = list(inspect.signature(cls.ia3_form.forward).parameters).index("position_embeddings") - 1
        cls.ia3_known = original.forward, getattr(cls.ia3_module, "apply_rotary_pos_emb", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's forward, its vectors applied on the way."""
        worn = self.ia3_worn()
        if worn.is_left_to_compiler:
            return super().forward(*args, **kwargs)
        positions = self._ia3_positions()
        if positions is None or not self._fits(worn, positions, args, kwargs):
            return super().forward(*args, **kwargs)
        assert self.ia3_form is not None
        return self.ia3_form.worn(self, worn, *args, **kwargs)

    def _ia3_positions(self) -> _Positions | None:
        """The positions of the vectors that are to be applied here; None where the projections have to wear them.

        Nothing may hang on these, as what is applied here is not seen there; and the functions that are replaced have
        to be those that were recognised.
        """
        forward, rotary = self.ia3_known
        form, modules = self.ia3_form, self._modules
        if form is None or self.ia3_original.forward is not forward:  # type: ignore[attr-defined]
            return None
        positions: list[int | None] = []
        for name in form.projections:
            layer = modules.get(name)
            if is_as_patched(layer):
                positions.append(layer.ia3_out)
            elif layer is None or isinstance(layer, Wearer):
                return None
            else:
                positions.append(None)
        return tuple(positions) if self.ia3_module.apply_rotary_pos_emb is rotary else None

    def _fits(self, worn: Worn, positions: _Positions, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the kernel computes what the attention's own forward would, for these arguments."""
        x = args[0] if args else kwargs.get("hidden_states")
        at = type(self).ia3_angles
        angles = args[at] if len(args) > at else kwargs.get("position_embeddings")
        if not isinstance(x, Tensor) or x.is_nested or angles is None:
            return False
        form, cos = self.ia3_form, angles[0]
        assert form is not None
        if cos.dtype is not x.dtype or (not form.is_partial and cos.shape[-1] != self.head_dim):
            return False  # torch would compute in another dtype, or not at all
        return not worn.by_row or all(
            position is None or layer.ia3_is_row_major(position, x, worn)
            for layer, position in zip(self._projections(), positions, strict=True)
        )

    def _projections(self) -> list[Any]:
        assert self.ia3_form is not None
        return [self._modules[name] for name in self.ia3_form.projections]

    def ia3_rotated(self, worn: Worn, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Sequence[Tensor]:
        """q, k and v of x [batch, length, width]: projected, scaled, rotated, [batch, heads, length, D]."""
        projected, vectors = [], []
        for layer in self._projections():
            if isinstance(layer, IA3Layer):
                projected.append(layer.ia3_forward(worn, layer.ia3_in, None, x))
                vectors.append(None if layer.ia3_out is None else worn.tables.bank[layer.ia3_out])
            else:
                projected.append(linear(layer, x)[0])
                vectors.append(None)
        return self.ia3_turned(worn, projected, vectors, position_embeddings)

    def ia3_turned(
        self,
        worn: Worn,
        projected: Sequence[Tensor],
        vectors: Sequence[Tensor | None],
        position_embeddings: tuple[Tensor, Tensor],
    ) -> Sequence[Tensor]:
        """q, k and v of what the projections put out, scaled by their vectors in the bank and rotated."""
        form, tables = self.ia3_form, worn.tables
        assert form is not None
        sizes, turned = form.sizes(self), _OF_ONE if len(projected) == 1 else _OF_THREE
        if not can_prepare(tables):
            mixed = tables.mixes, tables.route
            return turned(*projected, *vectors, *position_embeddings, *mixed, form.parts, sizes)
        prepared = self.ia3_prepared
        if prepared is None or prepared.fixed["sizes"] != sizes or not prepared.fits(tables):
            named = dict(zip(turned.vectors, vectors, strict=True))
            prepared = self.ia3_prepared = Prepared(tables, (), turned, **named, parts=form.parts, sizes=sizes)
        return prepared.call(tables, *projected, *position_embeddings)  # type: ignore[no-any-return]

    def ia3_attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        """What the attention function that the model's config names returns."""
        functions, eager = self.ia3_module.ALL_ATTENTION_FUNCTIONS, self.ia3_module.eager_attention_forward
        interface = functions.get_interface(self.config._attn_implementation, eager)  # type: ignore[union-attr]
        dropout = self.attention_dropout if self.training else 0.0
        return interface(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def ia3_hows(self, rows: int) -> dict[int, How]:
        """The rotary embedding's kernel, where `forward` takes it."""
        form, positions = self.ia3_form, self._ia3_positions()
        worn = [position for position in positions or () if position is not None]
        if form is None or not worn or not is_reached(self):
            return {}
        from ia3rt.kernels.configs import rope_config  # not before: Triton may not be installed

        weight = computing_tensor(self)
        outputs = [weight.new_empty(0, layer.weight.shape[0]) for layer in self._projections()]
        q, *_ = form.parts(*outputs, *form.sizes(self))
        config = rope_config(rows, q.shape[-1], weight.dtype)
        words = f"{config.block_m} rows × {config.group(q.shape[-2])} heads, {config.num_warps} warps"
        why = "q, k and v are read and rotated here anyway: the vector costs no pass"
        return dict.fromkeys(worn, How("rope", words, why))


class _Turned:
    """Projections' outputs [batch, length, width], scaled and rotated: q, k and v, [batch, heads, length, D] each.

    As one function of these outputs, so that a launch that is known takes no views of them.

    Attributes:
        vectors: what the vectors are called among the arguments of `body`, which is `__call__` past the dispatcher.
    """

    vectors: tuple[str, ...]

    def __call__(self, *args: Any) -> list[Tensor]:
        return self._by(ops.rope, *args)

    def _by(self, rope: Callable[..., list[Tensor]], *args: Any) -> list[Tensor]:
        count = len(self.vectors)
        *rest, parts, sizes = args[2 * count :]
        outputs, vectors = parts(*args[:count], *sizes), parts(*args[count : 2 * count], *sizes)
        return [part.transpose(1, 2) for part in rope(*outputs, *vectors, *rest, False)]


class _OfOne(_Turned):
    vectors = ("l",)

    def body(
        self,
        qkv: Tensor,
        l: Tensor,  # noqa: E741
        cos: Tensor,
        sin: Tensor,
        mixes: Tensor,
        route: Tensor,
        parts: Callable[..., tuple[Tensor, ...]],
        sizes: tuple[int, ...],
    ) -> list[Tensor]:
        return self._by(ops.rope.body, qkv, l, cos, sin, mixes, route, parts, sizes)


class _OfThree(_Turned):
    vectors = ("l_q", "l_k", "l_v")

    def body(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        l_q: Tensor | None,
        l_k: Tensor | None,
        l_v: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        mixes: Tensor,
        route: Tensor,
        parts: Callable[..., tuple[Tensor | None, ...]],
        sizes: tuple[int, ...],
    ) -> list[Tensor]:
        return self._by(ops.rope.body, q, k, v, l_q, l_k, l_v, cos, sin, mixes, route, parts, sizes)


_OF_ONE, _OF_THREE = _OfOne(), _OfThree()
