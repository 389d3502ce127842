"""What a step wears where a number meant something of another kind a step ago, on vLLM's own managers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loaded_layers import IN, OUT, load
from torch import Tensor, nn
from vllm.config import LoRAConfig, get_current_vllm_config
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.models import SupportsLoRA
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from ia3rt.adapters.site import Site
from ia3rt.serving.vllm import register
from ia3rt.serving.vllm.model_manager import IA3Model
from ia3rt.serving.vllm.slots import TokenSlots
from ia3rt.serving.vllm.worker_manager import IA3WorkerManager

TOKENS = 3
A, B = torch.randn(2, IN), torch.randn(OUT, 2)
VECTOR = 1 + torch.randn(OUT)
WEIGHT, BIAS = torch.randn(OUT, IN), torch.randn(OUT)


class OneLayer(nn.Module, SupportsLoRA):
    def __init__(self) -> None:
        super().__init__()
        self.packed_modules_mapping, self.config = {}, SimpleNamespace()
        self.layer = ColumnParallelLinear(IN, OUT, bias=True)
        load(self.layer, {None: (WEIGHT, BIAS)})


@pytest.fixture
def manager(one_process, monkeypatch) -> IA3WorkerManager:
    """A worker's, with one slot; `files.kind` says what its requests' path holds."""
    register()
    made = IA3WorkerManager.__new__(IA3WorkerManager)
    made._stand_ins, made.ia3rt_is_told = set(), True
    made._adapter_manager = made._manager_cls(
        model=OneLayer(),
        max_num_seqs=TOKENS,
        max_num_batched_tokens=TOKENS,
        vocab_size=9,
        lora_config=LoRAConfig(max_loras=1, max_lora_rank=8, max_cpu_loras=1, lora_dtype=torch.float32),
        vllm_config=get_current_vllm_config(),
        device=torch.device("cpu"),
    )
    made.files = SimpleNamespace(kind=None)

    def read(request: LoRARequest) -> LoRAModel:
        if made.files.kind is None:
            raise FileNotFoundError
        if made.files.kind == "lora":
            return LoRAModel(request.lora_int_id, 2, {"layer": LoRALayerWeights("layer", 2, 2, A.clone(), B.clone())})
        placed = made._adapter_manager.ia3_layers.place("a", {Site("layer", "out", OUT): VECTOR})
        return IA3Model(request.lora_int_id, placed)

    monkeypatch.setattr(made, "_load_adapter", read)
    return made


def step(manager: Any, x: Tensor, *requests: LoRARequest) -> Tensor:
    number = requests[0].lora_int_id
    manager.set_active_adapters(set(requests), LoRAMapping((number,) * len(x), (number,), is_prefill=True))
    y: Tensor = manager._adapter_manager.model.layer(x)[0]
    return y


@pytest.mark.parametrize("kinds", ["lora ia3", "ia3 lora", "gone lora", "gone ia3", "lora gone lora"])
def test_a_number_of_another_kind_is_worn_as_what_it_is_now(manager, kinds) -> None:
    x = torch.randn(TOKENS, IN)
    plain = x @ WEIGHT.T + BIAS
    right = {"lora": plain + x @ A.T @ B.T, "ia3": plain * VECTOR, "gone": plain}
    for kind in kinds.split():
        manager.files.kind = None if kind == "gone" else kind
        y = step(manager, x, LoRARequest("a", 1, "/a", load_inplace=True))
        torch.testing.assert_close(y, right[kind])
        assert manager.ia3rt_unreadable == ({1} if kind == "gone" else set())


def test_requests_that_name_one_number_in_two_ways_need_one_slot(manager) -> None:
    """As where some run since before it was loaded again."""
    x = torch.randn(TOKENS, IN)
    manager.files.kind = "ia3"
    y = step(manager, x, LoRARequest("a", 1, "/a"), LoRARequest("a#9", 1, "/a"))
    torch.testing.assert_close(y, (x @ WEIGHT.T + BIAS) * VECTOR)


def test_weights_that_are_loaded_again_after_a_sleep_find_the_slots_as_they_were_made(manager) -> None:
    """vLLM's sleep of level 2 keeps no tensor of a device but the model's buffers; then it resets what LoRA has."""
    x, request = torch.randn(TOKENS, IN), LoRARequest("a", 1, "/a")
    manager.files.kind = "ia3"
    step(manager, x, request)
    slots = manager._adapter_manager.ia3_slots
    made = TokenSlots(len(slots.index), slots.identity, torch.device("cpu"))
    table = manager._adapter_manager.model.layer.ia3_tables["out"]
    for kept in (slots.index, slots.mixes, table.rows):
        kept.zero_()
    LoRAModelRunnerMixin.reset_lora_state(SimpleNamespace(lora_config=True, lora_manager=manager, get_model=nn.Module))
    assert torch.equal(slots.index, made.index) and torch.equal(slots.mixes, made.mixes)
    mapping = LoRAMapping((1, 0, 1), (1, 0), is_prefill=True)  # of which one token wears nothing
    manager.set_active_adapters({request}, mapping)
    worn = torch.stack([VECTOR, torch.ones(OUT), VECTOR])
    torch.testing.assert_close(manager._adapter_manager.model.layer(x)[0], (x @ WEIGHT.T + BIAS) * worn)
    assert table.rows[slots.identity].unique().tolist() == [1.0]
