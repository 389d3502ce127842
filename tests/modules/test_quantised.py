"""Patched models whose weights are quantised: torchao's tensors and GPTQ's layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import logits, tiny_model, token_ids
from torch import Tensor, nn
from where import DEVICE, home

import ia3rt
from ia3rt import ops
from ia3rt.modules.layer import IA3Layer
from ia3rt.modules.weights import dense_weight, quantised_weight

torchao = pytest.importorskip("torchao.quantization")

IDS = token_ids()
FORMATS = ("int8", "fp8", "int4", "gptq", "gptq_v2")


class QuantLinear(nn.Module):
    """A layer as GPTQModel builds it: 4 bits, groups in act-order, zero points less one in the first format."""

    def __init__(self, linear: nn.Linear, version: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.version = 4, version
        N, K, g = self.out_features, self.in_features, 16
        generator = np.random.default_rng(N + K)
        g_idx = generator.permutation(np.arange(K) // g)
        weight = linear.weight.detach().float().numpy().T
        scales, zeros = np.empty((K // g, N), np.float32), np.empty((K // g, N), np.int64)
        for h in range(K // g):
            rows = weight[g_idx == h]
            low, high = rows.min(0), rows.max(0)
            scales[h] = ((high - low) / 15).astype(np.float16)
            zeros[h] = np.clip(np.round(-low / scales[h]), 1, 15)
        q = np.clip(np.round(weight / scales[g_idx]) + zeros[g_idx], 0, 15).astype(np.int64)
        stored = zeros - 1 if version == 1 else zeros
        qweight, qzeros = np.zeros((K // 8, N), np.int64), np.zeros((K // g, N // 8), np.int64)
        for k in range(K):
            qweight[k // 8] |= q[k] << 4 * (k % 8)
        for n in range(N):
            qzeros[:, n // 8] |= stored[:, n] << 4 * (n % 8)
        self.register_buffer("qweight", torch.from_numpy(qweight).to(torch.int32))
        self.register_buffer("qzeros", torch.from_numpy(qzeros).to(torch.int32))
        self.register_buffer("scales", torch.from_numpy(scales).half())
        self.register_buffer("g_idx", torch.from_numpy(g_idx).to(torch.int32))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        dense = torch.from_numpy(((q - zeros[g_idx]) * scales[g_idx].astype(np.float64)).T.copy())
        self.register_buffer("dense", dense, persistent=False)

    def qzero_format(self) -> int:
        return self.version

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def int4_tensor(weight: Tensor, g: int = 32) -> Tensor:
    """What torchao's Int4Tensor.from_hp makes by way of a package of kernels."""
    grouped = weight.detach().float().reshape(len(weight), -1, g)
    low, high = grouped.amin(2), grouped.amax(2)
    scale = (high - low) / 15
    q = ((grouped - low[..., None]) / scale[..., None]).round().clamp(0, 15).reshape(weight.shape).to(torch.int8) - 8
    packed = (q[:, 1::2] << 4) | (q[:, ::2] & 15)
    parts = [part.t().contiguous().to(weight.dtype) for part in (scale, low + 8 * scale)]
    return torchao.Int4Tensor(packed.contiguous(), *parts, block_size=[1, g], shape=weight.shape)


def dense_of(module: nn.Module) -> Tensor | None:
    """The float64 weight that a quantised layer stands for, by the publishers' own definition; None for others."""
    if isinstance(module, QuantLinear):
        return module.dense
    weight = getattr(module, "weight", None)
    if isinstance(weight, torchao.Int4Tensor):
        signed = weight.qdata.to(torch.int64)
        q = torch.stack([(signed & 15) - 16 * ((signed & 15) > 7), signed >> 4], 2).reshape(weight.shape).double()
        scale, zero = (
            part.double().t().repeat_interleave(weight.block_size[1], 1) for part in (weight.scale, weight.zero_point)
        )
        return q * scale + zero
    if isinstance(weight, (torchao.Int8Tensor, torchao.Float8Tensor)):
        return weight.qdata.double() * weight.scale.double()
    return None


def quantised_model(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The tiny Llama with the linear layers of its decoder quantised; for int4, those that our kernel runs.

    torchao's own matmul of int4, which the others would run, needs a GPU and another package.
    """
    model = tiny_model("llama", dtype)
    if kind in ("int8", "fp8"):
        config = torchao.Int8WeightOnlyConfig() if kind == "int8" else torchao.Float8WeightOnlyConfig()
        torchao.quantize_(model.model, config)
        return model
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if kind == "int4" and name in ("k_proj", "v_proj"):
                    child.weight = nn.Parameter(int4_tensor(child.weight), requires_grad=False)
                elif isinstance(child, nn.Linear) and kind != "int4":
                    setattr(parent, name, QuantLinear(child, 1 if kind == "gptq" else 2))
    return model


def exact_model(model: nn.Module, vectors: dict[str, Tensor]) -> nn.Module:
    """The truth: a dense model in float64 of the dequantised weights, the vectors multiplied into them."""
    exact = tiny_model("llama").double()
    with torch.no_grad():
        exact.load_state_dict(tiny_model("llama", model.lm_head.weight.dtype).state_dict())
        for path, module in model.named_modules():
            weight, s = dense_of(module), vectors.get(path)
            if weight is not None:
                exact.get_submodule(path).weight.copy_(weight)
            if s is not None and path.endswith("down_proj"):
                exact.get_submodule(path).weight *= s
            elif s is not None:
                exact.get_submodule(path).weight *= s[:, None]
                exact.get_submodule(path).bias *= s
    return exact


def random_vectors(runtime: ia3rt.Runtime) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {site.path: 0.5 + torch.rand(site.width, generator=generator) for site in runtime.sites}


CASES = [(kind, "triton") for kind in FORMATS] + [(kind, "torch") for kind in FORMATS if kind != "int4"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize(("kind", "backend"), CASES)
def test_vectors_act_on_quantised_layers(kind, backend, dtype, tolerance, monkeypatch) -> None:
    model = quantised_model(kind, dtype).to(home(backend))
    plain = None if kind == "int4" else logits(model, IDS)
    classes = {path: type(module) for path, module in model.named_modules()}
    kinds: list[str] = []
    run = ops.linear_quantised
    monkeypatch.setattr(ops, "linear_quantised", lambda *inputs: (kinds.append(inputs[10]), run(*inputs))[1])
    runtime = ia3rt.patch(model, backend=backend)
    vectors = random_vectors(runtime)
    runtime.add_adapter("b", vectors)
    for route, rows in (("b", slice(None)), (["b", None, "b"], slice(0, 3, 2))):
        runtime.set_adapter("b") if route == "b" else runtime.route(route)
        result, truth = logits(model, IDS)[rows].double(), logits(exact_model(model, vectors), IDS)[rows]
        assert (result - truth).abs().max() < tolerance * truth.abs().max()
    # k and v of two layers, twice; the vector of down_proj acts in the activation before it
    assert kinds == (8 * [kind] if backend == "triton" else [])
    runtime.unpatch()
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert plain is None or torch.equal(logits(model, IDS), plain)


@pytest.mark.parametrize("kind", FORMATS)
def test_merging_is_refused(kind) -> None:
    model = quantised_model(kind)
    runtime = ia3rt.patch(model)
    runtime.add_adapter("b", random_vectors(runtime))
    runtime.set_adapter("b")
    with pytest.raises(ValueError, match="its weight is quantised"):
        runtime.merge_adapter()


def test_no_kernel_reads_a_quantised_weight_as_a_matrix() -> None:
    layer = quantised_model("int8").model.layers[0].mlp.down_proj
    assert dense_weight(layer) == (None, None)
    assert dense_weight(nn.Linear(3, 4))[0] is not None


def test_a_layer_that_quantises_its_input_keeps_its_forward() -> None:
    model = tiny_model("llama", torch.bfloat16)
    torchao.quantize_(model.model, torchao.Int8DynamicActivationInt8WeightConfig())
    results = []
    for backend in ("torch", "triton"):
        runtime = ia3rt.patch(model.to(home(backend)), backend=backend)
        layer = model.model.layers[0].mlp.down_proj
        assert dense_weight(layer)[0] is None and quantised_weight(layer) is None
        runtime.add_adapter("b", random_vectors(runtime))
        runtime.set_adapter("b")
        results.append(logits(model, IDS))
        runtime.unpatch()
    torch.testing.assert_close(results[1], results[0], rtol=0.05, atol=0.05)


def test_layouts_that_the_kernel_does_not_read() -> None:
    layer = QuantLinear(nn.Linear(64, 32), 1)
    assert quantised_weight(layer) is not None
    layer.q_handle = 1  # ExLlama has shuffled it
    assert quantised_weight(layer) is None
    eight_bits = QuantLinear(nn.Linear(64, 32), 1)
    eight_bits.bits = 8
    assert quantised_weight(eight_bits) is None
    per_tensor = nn.Sequential(nn.Linear(64, 32))
    torchao.quantize_(per_tensor, torchao.Int8WeightOnlyConfig(granularity=torchao.PerTensor()))
    assert quantised_weight(per_tensor[0]) is None


def test_a_gptq_layer_moves_and_is_explained() -> None:
    model = quantised_model("gptq").to(DEVICE)
    runtime = ia3rt.patch(model, backend="triton")
    model.to(DEVICE)  # it has buffers only
    layer = model.model.layers[0].self_attn.k_proj
    assert isinstance(layer, IA3Layer)
    assert layer.ia3_out is not None and layer.ia3_hows(4)[layer.ia3_out].kernel == "linear_quantised"
    runtime.unpatch()
    assert type(layer) is QuantLinear
