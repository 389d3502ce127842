"""vLLM's layers with our vectors, whole and as each of several ranks has them, against plain torch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from loaded_layers import HEAD, IN, OUT, ROWS, layer_of, load, parts, worn
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from ia3rt.serving.vllm import layers

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(params=[(1, 0), (2, 0), (2, 1), (4, 3)], ids=lambda rank: f"rank {rank[1]} of {rank[0]}")
def rank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    size, number = request.param
    monkeypatch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: size)
    monkeypatch.setattr(linear, "get_tensor_model_parallel_rank", lambda: number)
    return size, number


def vectors(width: int) -> list[Tensor]:
    return [1 + 0.5 * torch.randn(width) for _ in range(2)]


def share(whole: Tensor, size: int, number: int, dim: int = -1) -> Tensor:
    return whole.chunk(size, dim)[number]


def test_packed_columns(rank) -> None:
    """gate_up_proj: the gate without a vector, up with one."""
    size, number = rank
    whole = parts({0: OUT, 1: 2 * OUT})
    base = MergedColumnParallelLinear(IN, [OUT, 2 * OUT], bias=True)
    load(base, whole)
    layer = layer_of(layers.IA3MergedColumnParallelLinear, base)
    assert layer.ia3_widths("out") == (OUT, 2 * OUT) and layer.ia3_widths("in") == ()
    up = vectors(2 * OUT)
    for slot, vector in enumerate(up):
        layer.set_ia3(slot, {"out": [None, vector]})
    x = torch.randn(len(ROWS), IN)
    y, _ = layer(x)
    gate, scaled = (x @ weight.T + bias for weight, bias in whole.values())
    expected = torch.cat([share(gate, size, number), share(scaled * worn(up), size, number)], dim=-1)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_packed_query_key_value(rank, key_heads) -> None:
    """With fewer key heads than ranks, some ranks have the same ones."""
    size, number = rank
    heads = 8
    whole = parts({"q": heads * HEAD, "k": key_heads * HEAD, "v": key_heads * HEAD})
    base = QKVParallelLinear(IN, HEAD, heads, key_heads, bias=True)
    load(base, whole)
    layer = layer_of(layers.IA3MergedQKVParallelLinear, base)
    assert layer.ia3_widths("out") == (heads * HEAD, key_heads * HEAD, key_heads * HEAD)
    key, value = vectors(key_heads * HEAD), vectors(key_heads * HEAD)
    for slot in range(2):
        layer.set_ia3(slot, {"out": [None, key[slot], value[slot]]})
    x = torch.randn(len(ROWS), IN)
    y, _ = layer(x)
    q, k, v = (x @ weight.T + bias for weight, bias in whole.values())
    groups = min(size, key_heads)
    group = number * groups // size
    expected = [share(q, size, number), share(k * worn(key), groups, group), share(v * worn(value), groups, group)]
    torch.testing.assert_close(y, torch.cat(expected, dim=-1))


def test_one_fused_query_key_value(rank) -> None:
    """GPT-2's c_attn, say: the checkpoint has one vector for all three."""
    size, number = rank
    whole = parts({"q": 32, "k": 16, "v": 16})
    base = QKVParallelLinear(IN, HEAD, 8, 4, bias=True)
    load(base, whole)
    layer = layer_of(layers.IA3QKVParallelLinear, base)
    assert layer.ia3_widths("out") == (64,)
    two = vectors(64)
    for slot, vector in enumerate(two):
        layer.set_ia3(slot, {"out": [vector]})
    x = torch.randn(len(ROWS), IN)
    y, _ = layer(x)
    products = torch.cat([x @ weight.T + bias for weight, bias in whole.values()], dim=-1) * worn(two)
    expected = [share(part, size, number) for part in products.split([32, 16, 16], dim=-1)]
    torch.testing.assert_close(y, torch.cat(expected, dim=-1))


@pytest.mark.parametrize("side", ["in", "out"])
def test_columns(rank, side) -> None:
    size, number = rank
    whole = parts({None: OUT})
    base = ColumnParallelLinear(IN, OUT, bias=True)
    load(base, whole)
    layer = layer_of(layers.IA3ColumnParallelLinear, base)
    two = vectors(layer.ia3_widths(side)[0])
    for slot, vector in enumerate(two):
        layer.set_ia3(slot, {side: [vector]})
    x = torch.randn(len(ROWS), IN)
    y, _ = layer(x)
    weight, bias = whole[None]
    expected = (x * worn(two)) @ weight.T + bias if side == "in" else (x @ weight.T + bias) * worn(two)
    torch.testing.assert_close(y, share(expected, size, number))


@pytest.mark.parametrize("side", ["in", "out"])
def test_rows(side, monkeypatch) -> None:
    """The ranks' results add up; the bias is on one of them, inside the scale."""
    weight, bias, x = torch.randn(OUT, IN), torch.randn(OUT), torch.randn(len(ROWS), IN)
    two = vectors(IN if side == "in" else OUT)
    for size in (1, 2, 4):
        total = torch.zeros(len(ROWS), OUT)
        for number in range(size):
            monkeypatch.setattr(linear, "get_tensor_model_parallel_world_size", lambda size=size: size)
            monkeypatch.setattr(linear, "get_tensor_model_parallel_rank", lambda number=number: number)
            base = RowParallelLinear(IN, OUT, bias=True)
            load(base, {None: (weight, bias)})
            base.reduce_results = False
            layer = layer_of(layers.IA3RowParallelLinear, base)
            assert layer.ia3_widths(side) == (len(two[0]),)
            for slot, vector in enumerate(two):
                layer.set_ia3(slot, {side: [vector]})
            total += layer(share(x, size, number))[0]
        expected = (x * worn(two)) @ weight.T + bias if side == "in" else (x @ weight.T + bias) * worn(two)
        torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("side", ["in", "out"])
def test_replicated(rank, side) -> None:
    weight, bias, x = torch.randn(OUT, IN), torch.randn(OUT), torch.randn(len(ROWS), IN)
    base = ReplicatedLinear(IN, OUT, bias=True)
    load(base, {None: (weight, bias)})
    layer = layer_of(layers.IA3ReplicatedLinear, base)
    two = vectors(layer.ia3_widths(side)[0])
    for slot, vector in enumerate(two):
        layer.set_ia3(slot, {side: [vector]})
    expected = (x * worn(two)) @ weight.T + bias if side == "in" else (x @ weight.T + bias) * worn(two)
    torch.testing.assert_close(layer(x)[0], expected)


class Doubled(ReplicatedLinear):
    """A layer that is more than its product, as GateLinear is."""

    def forward(self, x):
        y, bias = super().forward(x)
        return 2 * y, bias


@pytest.mark.parametrize("lora", [True, False])
def test_a_subclass_keeps_its_forward(lora) -> None:
    weight, bias, x = torch.randn(OUT, IN), torch.randn(OUT), torch.randn(len(ROWS), IN)
    base = Doubled(IN, OUT, bias=True)
    load(base, {None: (weight, bias)})
    layer = layer_of(layers.IA3ReplicatedLinear, base)
    layer.punica_wrapper = SimpleNamespace(add_lora_linear=lambda output, *_: output)
    layer.ia3_slots.write(ROWS, lora=lora)
    two = vectors(OUT)
    for slot, vector in enumerate(two):
        layer.set_ia3(slot, {"out": [vector]})
    torch.testing.assert_close(layer(x)[0], 2 * (x @ weight.T + bias) * worn(two))


def test_a_slot_that_is_given_away_keeps_nothing() -> None:
    base = ColumnParallelLinear(IN, OUT, bias=True)
    load(base, parts({None: OUT}))
    layer = layer_of(layers.IA3ColumnParallelLinear, base)
    layer.set_ia3(0, {"out": [torch.full((OUT,), 2.0)], "in": [torch.full((IN,), 3.0)]})
    layer.set_ia3(0, {"out": [torch.full((OUT,), 5.0)]})
    assert layer.ia3_tables["in"].rows.unique().tolist() == [1.0]
    layer.set_ia3(0, {})
    assert layer.ia3_tables["out"].rows.unique().tolist() == [1.0]


def test_what_nothing_wears_costs_nothing() -> None:
    base = ColumnParallelLinear(IN, OUT, bias=True)
    load(base, parts({None: OUT}))
    layer = layer_of(layers.IA3ColumnParallelLinear, base)
    layer.set_ia3(0, {})
    assert layer.ia3_tables == {}


def column_layer(slot: int) -> tuple[layers.IA3Layer, Tensor, Tensor]:
    """A layer with a vector in one slot, and its weight and bias."""
    base = ColumnParallelLinear(IN, OUT, bias=True)
    whole = parts({None: OUT})
    load(base, whole)
    layer = layer_of(layers.IA3ColumnParallelLinear, base)
    layer.ia3_slots.numbers = {0: 70, 1: 71, 2: 72}
    layer.set_ia3(slot, {"out": [torch.full((OUT,), 3.0)]})
    return layer, *whole[None]


@pytest.mark.parametrize("shape", [(len(ROWS) - 2, IN), (1500, IN), (1, 7, IN), (len(ROWS), 2, IN)])
def test_rows_that_are_not_the_steps_tokens_wear_nothing_and_it_is_told(shape) -> None:
    """An encoder's, or those that are left of the tokens: nobody knows whose they are."""
    layer, weight, bias = column_layer(slot=0)
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x)[0], x @ weight.T + bias)
    assert layer.ia3_slots.unworn == {70} and "tokens" in layer.ia3_refusal
    layer.ia3_slots.unworn, layer.ia3_refusal = set(), None
    layer.ia3_slots.write([1, 2, 3, 2], lora=False)  # of these nobody has a vector here
    torch.testing.assert_close(layer(x)[0], x @ weight.T + bias)
    assert layer.ia3_slots.unworn == set() and "tokens" in layer.ia3_refusal


def test_rows_that_vllm_pads_are_the_steps() -> None:
    layer, weight, bias = column_layer(slot=1)
    x = torch.randn(8, IN)
    with set_forward_context(None, VllmConfig(), num_tokens=8, batch_descriptor=BatchDescriptor(num_tokens=8)):
        y, _ = layer(x)
    scales = torch.tensor([3.0 if row == 1 else 1.0 for row in ROWS] + [1.0] * 3)
    torch.testing.assert_close(y, (x @ weight.T + bias) * scales[:, None])
    assert layer.ia3_slots.unworn == set() and layer.ia3_refusal is None


def test_every_class_stands_for_the_one_it_extends() -> None:
    for theirs, ours in layers.CLASSES.items():
        assert issubclass(ours, theirs)
