"""MLPs whose input site is scaled where the product act(gate) · up is formed, so that it costs no pass of its own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ia3rt import ops
from ia3rt.modules import eager
from ia3rt.modules.autocast import autocast
from ia3rt.modules.bare import is_bare
from ia3rt.modules.layer import IA3Layer, is_as_patched
from ia3rt.modules.mlp_forms import Form, form_of_class, is_of_a_library, kind_of
from ia3rt.modules.prepared import Prepared, can_prepare
from ia3rt.modules.set_forward import is_reached
from ia3rt.modules.wearer import How, Wearer, computing_tensor, original_class
from ia3rt.routing.tables import MixTables
from ia3rt.routing.traced import may_be_kept
from ia3rt.routing.worn import Worn


class IA3MLP(Wearer):
    """An MLP of a known form: its second matrix's vector is applied as that matrix's input is formed.

    It is a short way, and the layer itself wears the vector: where anything stands in between at a call, such as a hook
    on the second matrix, the MLP's own forward runs, and the layer scales its input.

    Attributes:
        ia3_form: the form, of the drop-in class.
        ia3_known: the original class's forward as it was when its form was recognised.
        ia3_prepared: the launch of the activation, as long as the bank stays.
    """

    ia3_form: ClassVar[Form | None]
    ia3_known: ClassVar[Any]
    ia3_prepared: Prepared | None = None

    def __init_subclass__(cls) -> None:
        """Recognises the form once, when the drop-in class is made."""
        super().__init_subclass__()
        original: Any = original_class(cls)
        cls.ia3_form, cls.ia3_known = form_of_class(original), original.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """down(s ∘ act(gate) ∘ up); the rounding is that of scaling the second matrix's input."""
        worn = self.ia3_worn()
        if worn.is_left_to_compiler:
            return super().forward(*args, **kwargs)  # it fuses what is multiplied, wherever that is
        by_kernel = self.ia3_routing.backend == "triton"
        down = self._ia3_layer(by_kernel)
        if down is None or kwargs or len(args) != 1:
            return super().forward(*args, **kwargs)
        form = self.ia3_form
        assert form is not None
        h = self._ia3_product(worn, form, down, args[0], by_kernel)
        y = down.ia3_forward(worn, None, down.ia3_out, h)
        return getattr(self, form.after)(y) if form.after else y

    def _ia3_layer(self, by_kernel: bool) -> IA3Layer | None:
        """The second matrix, whose vector is to be applied here; None where it has to wear it itself.

        Nothing may hang on it, as what is applied here is not seen there, nor on an activation that a kernel replaces;
        and the forward that is replaced has to be the one that was recognised.
        """
        form, modules = self.ia3_form, self._modules
        if form is None or self.ia3_original.forward is not type(self).ia3_known:  # type: ignore[attr-defined]
            return None
        down, activation = modules.get(form.down), modules.get(form.activation)
        if not is_as_patched(down) or down.ia3_in is None or activation is None:
            return None
        if by_kernel and (kind_of(activation) is None or not is_bare(activation)):
            return None
        return down

    def _ia3_product(self, worn: Worn, form: Form, down: IA3Layer, x: Tensor, by_kernel: bool) -> Tensor:
        """s ∘ act(gate) ∘ up, where s is what `down` wears at its input."""
        activation, position, routing = self._modules[form.activation], down.ia3_in, self.ia3_routing
        assert activation is not None and position is not None
        # The rows lie in x as in what becomes of it.
        if not by_kernel or (worn.by_row and not down.ia3_is_row_major(position, x, worn)):
            return _scaled_product(form, self, activation, x, down.ia3_scale(position, x, worn))
        kind, tables = kind_of(activation), worn.tables
        assert kind is not None
        matrices = form.first_matrices(self, x.dtype) if routing.fuses_gate_up else None
        if matrices is not None:
            vector = tables.bank[position], tables.mixes, tables.route, kind
            return ops.gate_up(*autocast(x, *matrices), *vector)  # type: ignore[no-any-return]
        gate, up, _ = form.gate_and_up(self, x)
        return self.ia3_activate(tables, position, gate, up, kind)

    def ia3_activate(self, tables: MixTables, position: int, gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
        """s ∘ act(gate) ∘ up by the kernel."""
        if not can_prepare(tables):
            return ops.activation(gate, up, tables.bank[position], tables.mixes, tables.route, kind)  # type: ignore[no-any-return]
        prepared = self.ia3_prepared
        if prepared is None or prepared.fixed["kind"] is not kind or not prepared.fits(tables):
            fixed = {"l": tables.bank[position], "kind": kind} | ({"up": None} if up is None else {})
            prepared = self.ia3_prepared = Prepared(tables, (), ops.activation, **fixed)
        return prepared.call(tables, gate) if up is None else prepared.call(tables, gate, up)  # type: ignore[no-any-return]

    def ia3_hows(self, rows: int) -> dict[int, How]:
        """As `forward` chooses."""
        form, routing = self.ia3_form, self.ia3_routing
        down = self._ia3_layer(routing.backend == "triton")
        if form is None or down is None or down.ia3_in is None or not is_reached(self):
            return {}
        return {down.ia3_in: self._how(form, down, rows)}

    def _how(self, form: Form, down: IA3Layer, rows: int) -> How:
        routing, weight = self.ia3_routing, computing_tensor(down)
        if routing.backend == "torch":
            return How("multiplication", "", f"in place in what the activation gives, before {form.down} reads it")
        from ia3rt.kernels.configs import activation_config  # not before: Triton may not be installed

        matrices = form.first_matrices(self, weight.dtype) if routing.fuses_gate_up else None
        if matrices is not None:
            from ia3rt.kernels.gate_up import plan
            from ia3rt.kernels.mixes import Routing

            gate, _, up, _ = matrices
            assert gate is not None
            tables = self.ia3_now().tables
            x, y = weight.new_empty(rows, gate.shape[1]), weight.new_empty(rows, gate.shape[0])
            config = plan(x, gate, up, y, Routing.of(tables.mixes, tables.route, rows))
            words = "torch, then the activation" if config is None else config.in_words()
            return How("gate_up", words, "patch(fuse_gate_up=True): what the vector scales is formed in the epilogue")
        config = activation_config(rows, routing.bank.widths[down.ia3_in or 0], weight.dtype)
        words = f"{config.block_m}×{config.block_n}, {config.num_warps} warps"
        return How(
            "activation", words, "the kernel reads act's argument and writes the product: the vector costs no pass"
        )


def _scaled_product(form: Form, mlp: nn.Module, activation: nn.Module, x: Tensor, scale: Tensor | None) -> Tensor:
    """s ∘ act(gate) ∘ up by torch; in as few tensors as can be, unless a gradient needs them or a compiler does that.

    What is allocated costs more than what is computed: past a megabyte or so the allocator maps and unmaps each of
    them, which shows as a tenth of a prompt's time on a CPU.
    """
    gate, up, ours = form.gate_and_up(mlp, x)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or may_be_kept():
        h = activation(gate)
        if up is None:  # the activation may need its result for its gradient
            return _scaled(h, scale)
        return _scaled_own(h * up, scale)
    bare = is_bare(activation)
    if ours and bare and kind_of(activation) == "silu":
        h = F.silu(gate, inplace=True)
    else:
        h = activation(gate)
        ours = bare and is_of_a_library(activation) and (ours or h is not gate)
    del gate
    if up is not None:
        h = h.mul_(up) if ours else h * up
    elif not ours:
        return _scaled(h, scale)
    return _scaled_own(h, scale)


def _scaled(h: Tensor, scale: Tensor | None) -> Tensor:
    return h if scale is None else eager.scaled(h, scale)


def _scaled_own(h: Tensor, scale: Tensor | None) -> Tensor:
    return h if scale is None else eager.scaled_own(h, scale)
