"""vLLM's manager of the adapters that one model has, which keeps IA³ mixes beside LoRAs in the same slots."""

from __future__ import annotations

from typing import Any

from vllm.config import CompilationMode, CUDAGraphMode
from vllm.lora.layers import LoRAMapping, LoRAMappingType
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LRUCacheLoRAModelManager

from ia3rt.serving.vllm.activations import scale_in_activations
from ia3rt.serving.vllm.finite import keep_finite
from ia3rt.serving.vllm.layers import IA3RowParallelLinear
from ia3rt.serving.vllm.placing import Layers, Placed
from ia3rt.serving.vllm.slots import TokenSlots
from ia3rt.serving.vllm.unfit import refuse_unfit


class IA3Model(LoRAModel):
    """A mix of IA³ adapters, where vLLM keeps a LoRA.

    Args:
        lora_model_id: vLLM's number for it.
        placed: its vectors, by layer.
    """

    def __init__(self, lora_model_id: int, placed: Placed) -> None:
        super().__init__(lora_model_id, 1, {})
        self.placed = placed


class DummyModel(LoRAModel):
    """What vLLM warms up and captures its graphs with: it runs LoRA's part and ours, as any step may have to."""


class IA3ModelManager(LRUCacheLoRAModelManager):
    """LRUCacheLoRAModelManager for LoRAs and IA³ mixes."""

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        key = self.mm_mapping.language_model[0] if self.supports_mm else DEFAULT_LANGUAGE_WRAPPER_KEY
        wrapper = self.punica_wrapper_mapping[key]
        self.ia3_slots = TokenSlots(self.max_num_batched_tokens, self.lora_slots, self.device)
        compilation = vllm_config.compilation_config
        eager = compilation.mode == CompilationMode.NONE and compilation.cudagraph_mode == CUDAGraphMode.NONE
        # A graph runs what it was captured with; and on a GPU the memory has to be known before the cache takes it.
        may_grow = eager and self.device.type == "cpu"
        text = {name: layer for name, layer in self.modules.items() if layer.punica_wrapper is wrapper}
        self.ia3_layers = Layers(self.model, text, self.packed_modules, may_grow, is_pooling=self.is_pooling_model)
        for layer in self.ia3_layers.wearing.values():
            layer.ia3_slots = self.ia3_slots
            if not may_grow:
                layer.ia3_table("in" if isinstance(layer, IA3RowParallelLinear) else "out")
        refuse_unfit(self.model, self.ia3_layers.wearing, self.packed_modules, vllm_config)
        scale_in_activations(self.model)
        keep_finite(self.model, self.ia3_slots)
        self._ia3_active: set[int] = set()
        self._ia3_evictions = 0

    def create_dummy_lora(self, *args: Any, **kwargs: Any) -> LoRAModel:
        """As vLLM's; see DummyModel."""
        made = super().create_dummy_lora(*args, **kwargs)
        return DummyModel(made.id, made.rank, made.loras)

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        if not isinstance(lora_model, IA3Model):
            super()._create_merged_loras_inplace(lora_model)

    def activate_adapter(self, lora_id: int) -> bool:
        """Gives an adapter a slot: its LoRA matrices, or its vectors, are copied there, and the other kind reset."""
        changed: bool = super().activate_adapter(lora_id)
        if changed:
            # vLLM writes a step's mapping only where numbers or slots changed, and ours also says what is a LoRA.
            self._last_mapping = None
            slot = self.lora_index_to_id.index(lora_id)
            model = self._registered_adapters.cache[lora_id]
            placed: Placed = {}
            if isinstance(model, IA3Model):
                placed = model.placed
                self._ia3_active.add(lora_id)
            for name, layer in self.ia3_layers.wearing.items():
                layer.set_ia3(slot, placed.get(name, {}))
        return changed

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self._ia3_active:  # vLLM calls this twice for one adapter
            self._ia3_active.remove(lora_id)
            self._ia3_evictions += 1
        super()._deactivate_adapter(lora_id)

    def remove_all_adapters(self) -> None:
        """Empties the slots; as when the model's weights are loaded again, after a sleep that discarded them."""
        super().remove_all_adapters()
        self.ia3_slots.reset()
        for layer in self.ia3_layers.wearing.values():
            for table in layer.ia3_tables.values():
                table.reset()

    def ia3_counts(self) -> dict[str, float]:
        """How many slots there are, how many hold IA³, and how often one that did was given to another."""
        return {"slots": self.lora_slots, "resident": len(self._ia3_active), "evictions": self._ia3_evictions}

    def _set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        models = self._registered_adapters.cache
        resident = [(slot, number) for slot, number in enumerate(self.lora_index_to_id) if number is not None]
        mixes = {number for _, number in resident if isinstance(models[number], IA3Model)}
        for_lora = tuple(0 if number in mixes else number for number in mapping.index_mapping)
        if mapping.type is LoRAMappingType.LANGUAGE:  # a tower's rows are no tokens of the step, and wear LoRAs only
            dummies = {number for _, number in resident if isinstance(models[number], DummyModel)}
            rows = {number: slot for slot, number in resident if number in mixes or number in dummies}
            self.ia3_slots.numbers = {slot: number for number, slot in rows.items()}
            identity = self.ia3_slots.identity
            self.ia3_slots.write([rows.get(number, identity) for number in mapping.index_mapping], lora=any(for_lora))
        # LoRA's part sees tokens with a mix as tokens of the base model, and so skips them.
        prompts = tuple(0 if number in mixes else number for number in mapping.prompt_mapping)
        super()._set_adapter_mapping(LoRAMapping(for_lora, prompts, mapping.is_prefill, mapping.type))
