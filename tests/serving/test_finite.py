"""What attention is handed to keep; test_poison.py has vLLM's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ia3rt.serving.vllm.finite import LARGEST, finite, keep_finite
from ia3rt.serving.vllm.slots import TokenSlots

HOSTILE = [float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 0.0, -1.5, 65504.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_what_is_not_finite_or_too_large_changes(dtype) -> None:
    x = torch.tensor(HOSTILE).to(dtype)
    kept = x.clone()
    y = finite(x)
    end = min(LARGEST, torch.finfo(dtype).max)
    right = [0.0 if v != v else max(-end, min(end, v)) for v in x.double().tolist()]
    assert y.double().tolist() == right and y.dtype == dtype
    assert torch.equal(x.isnan(), kept.isnan())
    # A masked score is finite, so that no kind of mask makes NaN of it.
    assert (256 * y.float().abs().max() * 2.0**40).isfinite()


class Kept(nn.Module):
    """vLLM's attention, as far as what it is handed."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, output_shape: object = None) -> Tensor:
        self.handed = key, value
        return query


def test_every_attention_layer_of_a_step_that_wears_something(monkeypatch) -> None:
    monkeypatch.setattr("ia3rt.serving.vllm.finite.Attention", Kept)
    slots = TokenSlots(8, 2, torch.device("cpu"))
    model = nn.Sequential(Kept(), nn.Sequential(Kept()))
    keep_finite(model, slots)
    x = torch.tensor(HOSTILE).expand(3, -1)
    layers = [module for module in model.modules() if isinstance(module, Kept)]
    assert len(layers) == 2
    for rows, lora in (([0, 2], False), ([2, 2], True), ([2, 2], False)):
        slots.write(rows, lora=lora)
        for layer in layers:
            layer(x, x, x)
            assert all(bool(kept.isfinite().all()) == slots.worn for kept in layer.handed)
    layers[0](x, None, None)  # as where another layer's cache is read
    assert layers[0].handed == (None, None)
