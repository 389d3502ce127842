"""What vLLM's manager of a model's adapters does with the mappings of a step, on a model with towers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from loaded_layers import IN, OUT, load, parts
from torch import Tensor, nn
from vllm.config import CacheConfig, CompilationMode, CUDAGraphMode, LoRAConfig, ParallelConfig
from vllm.lora import model_manager as of_vllm
from vllm.lora.layers import LoRAMapping, LoRAMappingType
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.models.module_mapping import MultiModelKeys

from ia3rt.adapters.site import Site
from ia3rt.serving.vllm import register
from ia3rt.serving.vllm.model_manager import IA3Model, IA3ModelManager
from ia3rt.serving.vllm.worker_manager import IA3WorkerManager

MIX, LORA = 7, 9
LAYER = "language.layer"

pytestmark = pytest.mark.usefixtures("one_process")


class Seeing(nn.Module):
    """A model of one layer in each of its parts, as vLLM's multi-modal ones have them."""

    supports_multimodal = supports_tower_connector_lora = True
    is_3d_moe_weight = is_non_gated_moe = False
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.config = None
        self.weights = {}
        for part in ("language", "tower", "connector"):
            layer = ColumnParallelLinear(IN, OUT, bias=True)
            whole = parts({None: OUT})
            load(layer, whole)
            self.weights[part] = whole[None]
            self.add_module(part, nn.Module())
            getattr(self, part).layer = layer

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(language_model="language", tower_model="tower", connector="connector")

    def get_mm_lora_token_counts(self, **kwargs: object) -> tuple[int, int]:
        return 256, 256


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> IA3ModelManager:
    """A manager with a mix and a LoRA, whose steps have 16 tokens at most."""
    register()
    budget = SimpleNamespace(
        mm_max_items_per_prompt={"image": 1}, get_encoder_budget=lambda: 256, mm_max_toks_per_item={"image": 256}
    )
    monkeypatch.setattr(of_vllm, "MultiModalBudget", lambda *_: budget)
    config = SimpleNamespace(
        parallel_config=ParallelConfig(),
        cache_config=CacheConfig(),
        model_config=SimpleNamespace(multimodal_config=SimpleNamespace(language_model_only=False)),
        compilation_config=SimpleNamespace(mode=CompilationMode.NONE, cudagraph_mode=CUDAGraphMode.NONE),
    )
    lora = LoRAConfig(max_loras=3, max_cpu_loras=3, max_lora_rank=8, enable_tower_connector_lora=True)
    lora.lora_dtype = torch.float32
    made = IA3ModelManager(Seeing(), 4, 16, 99, lora, torch.device("cpu"), vllm_config=config)
    vector = {Site(LAYER, "out", OUT): torch.full((OUT,), 3.0)}
    made.add_adapter(IA3Model(MIX, made.ia3_layers.place("mix", vector)))
    a, b = torch.ones(8, IN), torch.ones(OUT, 8)
    made.add_adapter(LoRAModel(LORA, 8, {LAYER: LoRALayerWeights(LAYER, 8, 8, a, b)}))
    for number in (MIX, LORA):
        made.activate_adapter(number)
    return made


def mapping(*numbers: int, kind: LoRAMappingType = LoRAMappingType.LANGUAGE) -> LoRAMapping:
    return LoRAMapping(numbers, numbers, True, kind)


def images(*numbers: int, size: int = 64) -> list[LoRAMapping]:
    """What vLLM maps after the step's tokens: a tower's rows, maybe more than a step has tokens, and a connector's."""
    rows = tuple(number for number in numbers for _ in range(size))
    return [mapping(*rows, kind=kind) for kind in (LoRAMappingType.TOWER, LoRAMappingType.CONNECTOR)]


def worn(model: nn.Module, x: Tensor, numbers: tuple[int, ...]) -> Tensor:
    """What the language model's layer makes of tokens that wear these, in float64."""
    weight, bias = (each.double() for each in model.weights["language"])
    rows = []
    for row, number in zip(x.double(), numbers, strict=True):
        y = weight @ row + bias
        rows.append({MIX: 3 * y, LORA: y + 8 * row.sum(), 0: y}[number])
    return torch.stack(rows)


@pytest.mark.parametrize("size", [1, 64])
@pytest.mark.parametrize("with_images", [(0,), (MIX, 0), (LORA, MIX)])
def test_images_leave_the_step_what_its_tokens_wear(manager, with_images, size) -> None:
    numbers = (MIX, 0, LORA, LORA, MIX)
    manager.set_adapter_mapping(mapping(*numbers))
    for each in images(*with_images, size=size):
        manager.set_adapter_mapping(each)
    x = torch.randn(len(numbers), IN)
    y, _ = manager.model.language.layer(x)
    torch.testing.assert_close(y.double(), worn(manager.model, x, numbers), rtol=1e-5, atol=1e-4)


def test_who_wears_a_vector_where_a_layer_has_other_rows_fails(manager) -> None:
    worker = IA3WorkerManager.__new__(IA3WorkerManager)
    worker._adapter_manager, worker._stand_ins = manager, set()
    requests = {LoRARequest("mix", MIX, "/nowhere/mix")}
    for rows, failed in ((4, set()), (3, {MIX}), (4, set())):
        worker.set_active_adapters(requests, mapping(MIX, 0, 0, MIX))
        manager.model.language.layer(torch.randn(rows, IN))
        assert worker.ia3rt_unreadable == failed
    with pytest.raises(ValueError, match=f"'late' .* {LAYER} .* 3 rows in a step of 4 tokens"):
        manager.ia3_layers.place("late", {Site(LAYER, "out", OUT): torch.ones(OUT)})


def test_what_a_step_could_not_read_is_not_forgotten_where_others_have_images(manager) -> None:
    worker = IA3WorkerManager.__new__(IA3WorkerManager)
    worker._adapter_manager, worker._stand_ins = manager, set()
    worker.ia3rt_is_told, worker.ia3rt_hands_on = True, False

    def unreadable(request: LoRARequest) -> LoRAModel:
        raise ValueError("gone")

    worker._load_adapter = unreadable
    seen = LoRARequest("seen", MIX, "/nowhere/seen")
    worker.set_active_adapters({seen, LoRARequest("gone", 8, "/nowhere/gone")}, mapping(MIX, 8))
    assert worker.ia3rt_unreadable == {8}
    for each in images(MIX):
        worker.set_active_adapters({seen}, each)
    assert worker.ia3rt_unreadable == {8}
