"""Tables of slots, by kernels in the interpreter and by plain torch, step by step and compiled, against float64."""

from __future__ import annotations

import pytest
import torch
from bar import assert_meets_bar
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ia3rt.serving.vllm.slots import TokenSlots
from ia3rt.serving.vllm.table import SlotTable

SLOTS, TOKENS, WIDTH = 5, 40, 24
STEPS = {
    "one": [2] * 4,
    "each another": [0, 1, 2, 3, 4, 0],
    "none": [SLOTS] * 6,
    "long, one": [2] * 30,
    "long, beside none": [SLOTS] * 7 + [3] * 20 + [SLOTS] + [1] * 5,
}


@pytest.fixture(params=["triton", "torch"])
def table(request: pytest.FixtureRequest) -> SlotTable:
    if request.param == "torch":
        request.getfixturevalue("torch_backend")
    made = SlotTable(TokenSlots(TOKENS, SLOTS, torch.device("cpu")), WIDTH)
    for slot in range(SLOTS):
        made.fill(slot, 0, 1 + torch.randn(WIDTH, generator=torch.Generator().manual_seed(slot)))
    return made


def write(table: SlotTable, rows: list[int]) -> Tensor:
    """Lets a step's tokens wear rows, and returns what that is: float32 [tokens, WIDTH]."""
    table._slots.write(rows, lora=False)
    return table.rows[torch.tensor(rows)].clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", STEPS)
def test_scales(step, dtype, table) -> None:
    worn = write(table, STEPS[step])
    x = torch.randn(len(worn), WIDTH).to(dtype)
    truth, peer = x.double() * worn.double(), (x * worn).to(dtype)
    kept = x.clone()
    assert_meets_bar(table.scaled(x), peer, truth)
    assert_meets_bar(table.scaled(x.unsqueeze(0))[0], peer, truth)  # as vLLM's Transformers backend has it
    assert torch.equal(x, kept)
    table.scale_(x)
    assert_meets_bar(x, peer, truth)


class Looking(TorchDispatchMode):
    """As one that counts or logs, which changes nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("step", STEPS)
def test_scales_in_place_whoever_looks_on(step, table) -> None:
    worn = write(table, STEPS[step])
    x = torch.randn(len(worn), WIDTH)
    y = x.clone()
    with Looking():
        table.scale_(y)
    assert torch.equal(y, x * worn)


def test_follows_the_steps_and_what_the_slots_hold(table) -> None:
    """What was gathered for one step is not what another wears, nor what a slot holds later."""
    x = torch.randn(3, WIDTH)
    for rows in ([0, 1, 2], [0, 1, 3], [4, 4, SLOTS]):
        worn = write(table, rows)
        for _ in range(2):
            assert torch.equal(table.scaled(x), x * worn)
    table.fill(4, 8, torch.full((2,), 7.0))
    assert torch.equal(table.scaled(x)[0, 8:10], x[0, 8:10] * 7)
    table.clear(4)
    assert torch.equal(table.scaled(x), x)


def test_vectors_for_some_columns_only() -> None:
    """As k's and v's are in qkv_proj."""
    table = SlotTable(TokenSlots(TOKENS, SLOTS, torch.device("cpu")), WIDTH)
    table.fill(0, 12, torch.full((4,), 3.0))
    table.fill(1, 8, torch.full((2,), 5.0))
    rows = [0] * 10 + [1] * 10
    table._slots.write(rows, lora=False)
    x = torch.randn(len(rows), WIDTH)
    truth = x.clone()
    truth[:10, 12:16] *= 3
    truth[10:, 8:10] *= 5
    assert torch.equal(table.scaled(x), truth)
    assert torch.equal(table.scaled(x[:3]), truth[:3])


def test_padding_wears_nothing(table) -> None:
    write(table, [1] * TOKENS)
    worn = write(table, [2, 3])
    x = torch.randn(5, WIDTH)
    y = table.scaled(x)
    assert torch.equal(y[2:], x[2:]) and torch.equal(y[:2], x[:2] * worn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(dtype, table) -> None:
    """What a step decides is read when it runs, not when it was compiled."""

    @torch.compile(backend="aot_eager", fullgraph=True)
    def layer(x: Tensor) -> Tensor:
        y = table.scaled(x) + 1
        table.scale_(y)
        return y

    x = torch.randn(3, WIDTH).to(dtype)
    for rows in ([SLOTS] * 3, [1, 1, 1], [0, SLOTS, 3]):
        worn = write(table, rows)
        assert torch.equal(layer(x), (((x * worn).to(dtype) + 1) * worn).to(dtype))
