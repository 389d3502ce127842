"""vLLM's linear layers with LoRA, which can wear an IA³ vector as well, in the same batch.

A slot holds a LoRA or an IA³ mix. Tokens with a LoRA are multiplied by ones here, and tokens with a mix get nothing
from LoRA's part, so that neither disturbs the other.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from vllm import envs
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from ia3rt.serving.vllm.slots import TokenSlots
from ia3rt.serving.vllm.table import SlotTable

Side: TypeAlias = Literal["in", "out"]
logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is under its own name
_PRODUCTS = (ColumnParallelLinear.forward, RowParallelLinear.forward, ReplicatedLinear.forward)
"""What multiplies by the weight as its quantisation method does it; a subclass may do another thing."""


class IA3Layer(BaseLinearLayerWithLoRA):
    """What a layer needs to wear IA³ vectors; the classes below mix it into vLLM's.

    Attributes:
        ia3_tables: by side, as wide as this rank's share; a side that nothing uses has none, and costs nothing.
        ia3_slots: which slot each token wears; None where the manager lets the layer wear none, as in a vision tower.
        ia3_input: what the input is. It may have its vector already, from the activation before this layer; or be held
            by nobody else, so that it is scaled in place; or be held by others.
        ia3_refusal: why the layer can wear no vector, as the end of a sentence, where that is so; of vLLM's model
            (unfit.py), or seen when the layer ran.
    """

    ia3_tables: dict[Side, SlotTable]
    ia3_slots: TokenSlots | None = None
    ia3_input: Literal["scaled", "own", "shared"] = "shared"
    ia3_refusal: str | None = None

    def __init__(self, base_layer: Any) -> None:
        super().__init__(base_layer)
        # vLLM looks attributes up in Python, and this one ten times a call.
        self.__dict__["base_layer"] = base_layer
        self._is_product = type(base_layer).forward in _PRODUCTS

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Makes LoRA's buffers, and no table yet."""
        # vLLM's operations on a CPU read row -1 for tokens without a LoRA, and so add the last slot's: it has to be one
        # that stays zero.
        spare = 1 if torch.device(self.device).type == "cpu" else 0
        super().create_lora_weights(max_loras + spare, lora_config, model_config)
        self.ia3_tables = {}
        self._ia3_worn: set[int] = set()  # slots with a vector here

    def ia3_widths(self, side: Side) -> tuple[int, ...]:
        """The lengths of the vectors that a checkpoint may have here, one for each layer that is packed into this one.

        Empty where the layer can wear none on that side: packed layers share their input.
        """
        if side == "out":
            return self._output_widths()
        return (self.base_layer.input_size,) if self.n_slices == 1 else ()

    def _output_widths(self) -> tuple[int, ...]:
        return (self.base_layer.output_size,)

    def ia3_table(self, side: Side) -> SlotTable:
        """The table of a side, made where it is missing."""
        if side not in self.ia3_tables:
            width = self.input_size if side == "in" else sum(self._shares())
            assert self.ia3_slots is not None
            self.ia3_tables[side] = SlotTable(self.ia3_slots, width)
        return self.ia3_tables[side]

    def set_ia3(self, slot: int, vectors: dict[Side, list[Tensor | None]]) -> None:
        """Fills a slot.

        Args:
            slot: the row.
            vectors: by side, a whole vector or None for each of `ia3_widths`; this rank takes its share.
        """
        for table in self.ia3_tables.values():
            table.clear(slot)
        self._ia3_worn.discard(slot)
        if vectors:
            self._ia3_worn.add(slot)
        for side, whole in vectors.items():
            table, start = self.ia3_table(side), 0
            for width, vector in self._in_shares(whole) if side == "in" else self._out_shares(whole):
                if vector is not None:
                    table.fill(slot, start, vector.view(-1))
                start += width

    def _in_shares(self, whole: list[Tensor | None]) -> list[tuple[int, Tensor | None]]:
        (vector,) = whole
        assert vector is not None
        return [(self.input_size, self._share("a", vector.view(1, -1)))]

    def _out_shares(self, whole: list[Tensor | None]) -> list[tuple[int, Tensor | None]]:
        return list(zip(self._shares(), self._output_shares(whole), strict=True))

    def _share(self, matrix: Literal["a", "b"], vector: Tensor) -> Tensor:
        # vLLM's own slicing for tensor parallelism: an input vector is cut as LoRA's A is, an output vector as B.
        if self.tp_size == 1:
            return vector
        cut: Tensor = (self.slice_lora_a if matrix == "a" else self.slice_lora_b)(vector)
        return cut

    def _shares(self) -> tuple[int, ...]:
        """The widths of this rank's shares of the output."""
        return tuple(self.output_slices)

    def _output_shares(self, vectors: list[Tensor | None]) -> list[Tensor | None]:
        (vector,) = vectors
        assert vector is not None
        return [self._share("b", vector.view(-1, 1))]

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's product with what the tokens wear.

        Args:
            x: [tokens, in] or [1, tokens, in].
            bias: [out], inside the scale.
        """
        tables = self.ia3_tables
        if tables and not self.ia3_fits(x):
            plain: Tensor = super().apply(x, bias)
            return plain
        if "in" in tables and self.ia3_input == "own":
            tables["in"].scale_(x)
        elif "in" in tables and self.ia3_input == "shared":
            x = tables["in"].scaled(x)
        table = tables.get("out")
        if table is not None and table.by_kernel and self._has_matrix():
            return self._apply_lora_to_output(x, table.linear(x, self.base_layer.weight, bias))
        if self._is_product and not self._runs_lora():
            output: Tensor = self.base_layer.quant_method.apply(self.base_layer, x, bias)
        else:
            output = super().apply(x, bias)
        if table is not None:
            table.scale_(output)
        return output

    def ia3_fits(self, x: Tensor) -> bool:
        """Whether x has a row for each of the step's tokens, where it is seen.

        If not, nobody knows which row wears what. So the layer puts no vector on, requests that wear one here fail, and
        no adapter that has one is loaded any more.

        Args:
            x: [tokens, in] or [1, tokens, in].
        """
        slots = self.ia3_slots
        if torch.compiler.is_compiling() or slots is None or not slots.runs:
            return True
        rows = x.numel() // x.shape[-1]
        if rows == slots.tokens or _is_padded(rows):
            return True
        unworn = {slots.numbers[row] for _, _, row in slots.runs if row in self._ia3_worn}
        if self.ia3_refusal is None:
            self.ia3_refusal = (
                f"which ran on {rows} rows in a step of {slots.tokens} tokens, so that nobody knows what each wears"
            )
            logger.warning("No adapter can act at a %s %s", type(self.base_layer).__name__, self.ia3_refusal)
        slots.unworn |= unworn
        return False

    def _has_matrix(self) -> bool:
        """Whether our kernels read the weight, and nobody asked for vLLM's own that do not depend on the batch."""
        plain = self._is_product and type(self.base_layer.quant_method) is UnquantizedLinearMethod
        return plain and self.base_layer.weight.dim() == 2 and not envs.VLLM_BATCH_INVARIANT

    def _runs_lora(self) -> bool:
        """Whether LoRA's part is run: what is compiled has to have it, whatever the step's tokens wear."""
        return self.ia3_slots is None or self.ia3_slots.lora or torch.compiler.is_compiling()

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        if not self._runs_lora():
            return output
        added: Tensor = super()._apply_lora_to_output(x, output)
        return added


def _is_padded(rows: int) -> bool:
    """Whether vLLM has made so many rows of a step's tokens, for a graph or as other processes have them."""
    step = get_forward_context().batch_descriptor if is_forward_context_available() else None
    return step is not None and rows == step.num_tokens


class _PackedIA3Layer(IA3Layer):
    """A layer that stands for several of the checkpoint's, such as qkv_proj for q_proj, k_proj and v_proj."""

    def _output_shares(self, vectors: list[Tensor | None]) -> list[Tensor | None]:
        columns = [None if vector is None else vector.view(-1, 1) for vector in vectors]
        if self.tp_size == 1:
            return columns
        shares: list[Tensor | None] = self.slice_lora_b(columns)
        return shares

    def _output_widths(self) -> tuple[int, ...]:
        return tuple(self.output_sizes)


class IA3ColumnParallelLinear(IA3Layer, ColumnParallelLinearWithLoRA):
    """ColumnParallelLinear, or a MergedColumnParallelLinear that the checkpoint holds as one layer."""


class IA3QKVParallelLinear(IA3Layer, QKVParallelLinearWithLoRA):
    """QKVParallelLinear that the checkpoint holds as one layer."""

    def _output_widths(self) -> tuple[int, ...]:
        return (self.q_proj_total_size + 2 * self.kv_proj_total_size,)


class IA3MergedColumnParallelLinear(_PackedIA3Layer, MergedColumnParallelLinearWithLoRA):
    """MergedColumnParallelLinear, such as gate_up_proj."""


class IA3MergedQKVParallelLinear(_PackedIA3Layer, MergedQKVParallelLinearWithLoRA):
    """QKVParallelLinear of q_proj, k_proj and v_proj."""

    def _output_widths(self) -> tuple[int, ...]:
        # Not output_sizes: those count a key head as often as ranks share it.
        base = self.base_layer
        key = base.total_num_kv_heads * base.head_size
        return (base.total_num_heads * base.head_size, key, key)


class IA3RowParallelLinear(IA3Layer, RowParallelLinearWithLoRA):
    """RowParallelLinear, such as down_proj."""


class IA3ReplicatedLinear(IA3Layer, ReplicatedLinearWithLoRA):
    """ReplicatedLinear."""


CLASSES: dict[type, type] = {
    ColumnParallelLinearWithLoRA: IA3ColumnParallelLinear,
    MergedColumnParallelLinearWithLoRA: IA3MergedColumnParallelLinear,
    QKVParallelLinearWithLoRA: IA3QKVParallelLinear,
    MergedQKVParallelLinearWithLoRA: IA3MergedQKVParallelLinear,
    RowParallelLinearWithLoRA: IA3RowParallelLinear,
    ReplicatedLinearWithLoRA: IA3ReplicatedLinear,
}
"""Our class for each of vLLM's."""
