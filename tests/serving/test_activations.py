"""MLPs whose activation applies the vector of the layer behind it, and those where the layer does."""

from __future__ import annotations

import os

import pytest
import torch
from loaded_layers import LORA, ROWS, SLOTS, worn
from torch import nn
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.mistral import MistralMLP
from vllm.model_executor.models.qwen2 import Qwen2MLP

from ia3rt.serving.vllm.activations import ScaledActivation, scale_in_activations
from ia3rt.serving.vllm.layers import IA3RowParallelLinear
from ia3rt.serving.vllm.slots import TokenSlots

HIDDEN, WIDTH = 24, 32

pytestmark = pytest.mark.usefixtures("one_process")


class AnotherMLP(LlamaMLP):
    """Computes the same in another way, so that its forward is not known."""

    def forward(self, x):
        h, _ = self.gate_up_proj(x)
        return self.down_proj(self.act_fn(h))[0]


@pytest.mark.parametrize(
    ("cls", "known"), [(LlamaMLP, True), (Qwen2MLP, True), (MistralMLP, True), (AnotherMLP, False)]
)
def test_mlp(cls, known) -> None:
    arguments = dict(hidden_size=HIDDEN, intermediate_size=WIDTH, hidden_act="silu")
    mlp = cls(**arguments)
    weights = []
    for layer in (mlp.gate_up_proj, mlp.down_proj):
        weights.append(layer.weight.data.normal_().clone())  # on a CPU vLLM packs them next, and lets them go
        layer.quant_method.process_weights_after_loading(layer)
    down = IA3RowParallelLinear(mlp.down_proj)
    down.create_lora_weights(SLOTS, LORA)
    down.ia3_slots = TokenSlots(64, SLOTS, torch.device("cpu"))
    mlp.down_proj = down
    model = nn.ModuleDict({"mlp": mlp})
    scale_in_activations(model)
    by_kernel = os.environ.get("TRITON_INTERPRET") == "1"
    assert isinstance(mlp.act_fn, ScaledActivation) == (known and by_kernel)
    assert down.ia3_input == ("shared" if not known else "scaled" if by_kernel else "own")

    vectors = [1 + 0.5 * torch.randn(WIDTH) for _ in range(2)]
    for slot, vector in enumerate(vectors):
        down.set_ia3(slot, {"in": [vector]})
    x = torch.randn(len(ROWS), HIDDEN)
    gate, up = (x @ weights[0].T).chunk(2, dim=-1)
    h = nn.functional.silu(gate) * up
    for rows, scale in ((ROWS, worn(vectors)), ([SLOTS] * len(ROWS), torch.ones(len(ROWS), WIDTH))):
        down.ia3_slots.write(rows, lora=False)
        torch.testing.assert_close(mlp(x), (h * scale) @ weights[1].T, atol=1e-4, rtol=1e-4)
