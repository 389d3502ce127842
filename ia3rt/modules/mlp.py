"""MLPs whose input site is scaled where the product act(gate) · up is formed, so that it costs no pass of its own."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ia3rt import ops
from ia3rt.adapters.site import Side
from ia3rt.modules import eager
from ia3rt.modules.autocast import autocast
from ia3rt.modules.bare import is_bare
from ia3rt.modules.mlp_forms import KINDS, Form, form_of, form_of_class
from ia3rt.modules.prepared import Prepared, can_prepare
from ia3rt.modules.wearer import How, Wearer, computing_tensor, original_class
from ia3rt.routing.tables import MixTables


class IA3MLP(Wearer):
    """An MLP of a known form, which scales the input of its second matrix as that is formed.

    Attributes:
        ia3_form: the form, of the drop-in class.
        ia3_prepared: the launch of the activation, as long as the bank stays.
    """

    ia3_form: ClassVar[Form | None]
    ia3_prepared: Prepared | None = None

    def __init_subclass__(cls) -> None:
        """Recognises the form once, when the drop-in class is made."""
        super().__init_subclass__()
        cls.ia3_form = form_of_class(original_class(cls))

    def forward(self, x: Tensor) -> Tensor:
        """down(s ∘ act(gate) ∘ up); the rounding is that of scaling the second matrix's input."""
        form, routing = self.ia3_form, self.ia3_routing
        assert form is not None and self.ia3_in is not None
        activation = self._modules[form.activation]
        assert activation is not None
        kind = KINDS.get(type(activation).__name__)
        worn = routing.now()
        if routing.backend == "torch" or kind is None or (worn.by_row and not self.ia3_is_row_major(x, worn)):
            scale = self.ia3_scale(self.ia3_in, x, worn)
            return form.finish(self, _scaled_product(form, self, activation, x, scale))
        tables = worn.tables
        matrices = form.first_matrices(self, x.dtype) if routing.fuses_gate_up else None
        if matrices is not None:
            vector = tables.bank[self.ia3_in], tables.mixes, tables.route, kind
            return form.finish(self, ops.gate_up(*autocast(x, *matrices), *vector))
        gate, up, _ = form.gate_and_up(self, x)
        return form.finish(self, self.ia3_activate(gate, up, kind, tables))

    def ia3_activate(self, gate: Tensor, up: Tensor | None, kind: str, tables: MixTables) -> Tensor:
        """s ∘ act(gate) ∘ up by the kernel."""
        if not can_prepare(tables):
            return ops.activation(gate, up, tables.bank[self.ia3_in or 0], tables.mixes, tables.route, kind)  # type: ignore[no-any-return]
        prepared = self.ia3_prepared
        if prepared is None or prepared.fixed["kind"] is not kind or not prepared.fits(tables):
            fixed = {"l": tables.bank[self.ia3_in or 0], "kind": kind} | ({"up": None} if up is None else {})
            prepared = self.ia3_prepared = Prepared(tables, (), ops.activation, **fixed)
        return prepared.call(tables, gate) if up is None else prepared.call(tables, gate, up)  # type: ignore[no-any-return]

    @classmethod
    def is_fused(cls, module: nn.Module) -> bool:
        """Whether the kernel knows the activation."""
        form = form_of(module)
        return form is not None and type(getattr(module, form.activation)).__name__ in KINDS

    def ia3_how(self, side: Side, rows: int) -> How:
        """As `forward` chooses."""
        form, routing = self.ia3_form, self.ia3_routing
        assert form is not None
        activation = getattr(self, form.activation)
        kind, weight = KINDS.get(type(activation).__name__), computing_tensor(getattr(self, form.down))
        if routing.backend == "torch" or kind is None:
            known = "" if routing.backend == "torch" else f"; no kernel knows {type(activation).__name__}"
            return How(
                "multiplication", "", f"in place in what the activation gives, before {form.down} reads it{known}"
            )
        from ia3rt.kernels.configs import activation_config  # not before: Triton may not be installed

        matrices = form.first_matrices(self, weight.dtype) if routing.fuses_gate_up else None
        if matrices is not None:
            from ia3rt.kernels.gate_up import plan
            from ia3rt.kernels.mixes import Routing

            gate, _, up, _ = matrices
            assert gate is not None
            tables = routing.now().tables
            x, y = weight.new_empty(rows, gate.shape[1]), weight.new_empty(rows, gate.shape[0])
            config = plan(x, gate, up, y, Routing.of(tables.mixes, tables.route, rows))
            words = "torch, then the activation" if config is None else config.in_words()
            return How("gate_up", words, "patch(fuse_gate_up=True): what the vector scales is formed in the epilogue")
        config = activation_config(rows, self.ia3_routing.bank.widths[self.ia3_in or 0], weight.dtype)
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
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        h = activation(gate)
        if up is None:  # the activation may need its result for its gradient
            return _scaled(h, scale)
        return _scaled_(h * up, scale)
    bare = is_bare(activation)
    if ours and bare and KINDS.get(type(activation).__name__) == "silu":
        h = F.silu(gate, inplace=True)
    else:
        h = activation(gate)
        ours = bare and (ours or h is not gate)
    del gate
    if up is not None:
        h = h.mul_(up) if ours else h * up
    elif not ours:
        return _scaled(h, scale)
    return _scaled_(h, scale)


def _scaled(h: Tensor, scale: Tensor | None) -> Tensor:
    return h if scale is None else eager.scale_input(h, scale)


def _scaled_(h: Tensor, scale: Tensor | None) -> Tensor:
    return h if scale is None else eager.scale_output_(h, scale)
