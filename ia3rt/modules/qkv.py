"""Attentions with one projection for q, k and v, whose vector is applied where the rotary embedding is.

The rotary embedding reads and writes q and k anyway, so the vector costs no pass of its own, whatever the projection is
made of: a quantised one too. And one launch takes the place of the dozen operations of transformers' embedding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from ia3rt import ops
from ia3rt.modules.layer import IA3Layer, is_as_patched
from ia3rt.modules.prepared import Prepared, can_prepare
from ia3rt.modules.qkv_forms import Form, form_of_class, original_forward
from ia3rt.modules.set_forward import is_reached
from ia3rt.modules.wearer import How, Wearer, computing_tensor, original_class
from ia3rt.routing.worn import Worn


class IA3QKV(Wearer):
    """An attention of a known form: its projection's vector is applied where q and k are rotated.

    It is a short way, and the projection itself wears the vector: where anything stands in between at a call, such as a
    hook on the projection, the attention's own forward runs, and the projection scales its output.

    Attributes:
        ia3_form: the form, of the drop-in class.
        ia3_known: the original class's forward, and the rotary embedding that it calls, as they were recognised.
        ia3_module: the module that its forward is from, and finds the attention functions in.
        ia3_prepared: the launch of the rotary embedding, as long as the bank stays.
    """

    ia3_form: ClassVar[Form | None]
    ia3_known: ClassVar[tuple[Any, Any]]
    ia3_module: ClassVar[Any]
    ia3_prepared: Prepared | None = None

    def __init_subclass__(cls) -> None:
        """Recognises the form once, when the drop-in class is made."""
        super().__init_subclass__()
        original: Any = original_class(cls)
        forward = original_forward(original)
        cls.ia3_form = form_of_class(original)
        cls.ia3_module = None if forward is None else sys.modules[forward.__module__]
        cls.ia3_known = original.forward, getattr(cls.ia3_module, "apply_rotary_pos_emb", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's forward, its vector applied on the way."""
        projection, worn = self._ia3_layer(), self.ia3_routing.now()
        if projection is None or (worn.by_row and not self._is_row_major(projection, worn, args, kwargs)):
            return super().forward(*args, **kwargs)
        assert self.ia3_form is not None
        return self.ia3_form.worn(self, *args, **kwargs)

    def _ia3_layer(self) -> IA3Layer | None:
        """The projection, whose vector is to be applied here; None where it has to wear it itself.

        Nothing may hang on it, as what is applied here is not seen there; and the functions that are replaced have to
        be those that were recognised.
        """
        forward, rotary = self.ia3_known
        if self.ia3_form is None or self.ia3_original.forward is not forward:  # type: ignore[attr-defined]
            return None
        projection = self._modules.get(self.ia3_form.projection)
        if not is_as_patched(projection) or projection.ia3_out is None:
            return None
        return projection if self.ia3_module.apply_rotary_pos_emb is rotary else None

    def _is_row_major(self, projection: IA3Layer, worn: Worn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        x = args[0] if args else kwargs.get("hidden_states")
        position = projection.ia3_out
        return isinstance(x, Tensor) and position is not None and projection.ia3_is_row_major(position, x, worn)

    def ia3_projected(self, x: Tensor) -> Tensor:
        """The projection's output for x [batch, length, width], without the vector that `ia3_rotated` applies."""
        assert self.ia3_form is not None
        projection: Any = self._modules[self.ia3_form.projection]
        return projection.ia3_forward(self.ia3_routing.now(), projection.ia3_in, None, x)  # type: ignore[no-any-return]

    def ia3_rotated(self, qkv: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """q, k and v of the projection's output [batch, length, width]: scaled, rotated, [batch, heads, length, D]."""
        assert self.ia3_form is not None
        form, tables = self.ia3_form, self.ia3_routing.now().tables
        projection: Any = self._modules[form.projection]
        l, sizes = tables.bank[projection.ia3_out], form.sizes(self)  # noqa: E741
        if not can_prepare(tables):
            worn = tables.mixes, tables.route
            return tuple(_rotated(qkv, l, *position_embeddings, *worn, form.parts, sizes))
        prepared = self.ia3_prepared
        if prepared is None or prepared.fixed["sizes"] != sizes or not prepared.fits(tables):
            prepared = self.ia3_prepared = Prepared(tables, (), _rotated, l=l, parts=form.parts, sizes=sizes)
        return tuple(prepared.call(tables, qkv, *position_embeddings))

    def ia3_attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        """What the attention function that the model's config names returns."""
        functions, eager = self.ia3_module.ALL_ATTENTION_FUNCTIONS, self.ia3_module.eager_attention_forward
        interface = functions.get_interface(self.config._attn_implementation, eager)  # type: ignore[union-attr]
        dropout = self.attention_dropout if self.training else 0.0
        return interface(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def ia3_hows(self, rows: int) -> dict[int, How]:
        """The rotary embedding's kernel, where `forward` takes it."""
        form, projection = self.ia3_form, self._ia3_layer()
        if form is None or projection is None or projection.ia3_out is None or not is_reached(self):
            return {}
        from ia3rt.kernels.configs import rope_config  # not before: Triton may not be installed

        q, *_ = form.parts(self.ia3_routing.now().tables.bank[projection.ia3_out], *form.sizes(self))
        config = rope_config(rows, q.shape[-1], computing_tensor(projection).dtype)
        words = f"{config.block_m} rows × {config.group(q.shape[-2])} heads, {config.num_warps} warps"
        why = "q, k and v are read and rotated here anyway: the vector costs no pass"
        return {projection.ia3_out: How("rope", words, why)}


class _Rotated:
    """The parts of a projection's output [batch, length, width], scaled and rotated: [batch, heads, length, D] each.

    As one function of that output, so that a launch that is known takes no views of it.
    """

    def __call__(self, *args: Any) -> list[Tensor]:
        return self._by(ops.rope, *args)

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
        """The same past the dispatcher."""
        return self._by(ops.rope.body, qkv, l, cos, sin, mixes, route, parts, sizes)

    @staticmethod
    def _by(rope: Callable[..., list[Tensor]], qkv: Tensor, l: Tensor, *rest: Any) -> list[Tensor]:  # noqa: E741
        *rest, parts, sizes = rest  # type: ignore[assignment]
        return [part.transpose(1, 2) for part in rope(*parts(qkv, *sizes), *parts(l, *sizes), *rest, False)]


_rotated = _Rotated()
