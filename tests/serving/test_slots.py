"""Scaling tokens by their slots' rows: kernels in the interpreter and plain torch, against float64."""

from __future__ import annotations

import pytest
import torch
from bar import assert_meets_bar
from torch import Tensor

from ia3rt.serving.vllm.slots import TokenSlots, activation_slots, scale_slots_, scaled_slots

SLOTS, TOKENS, WIDTH = 5, 40, 24
STEPS = {
    "one": [2] * 9,
    "each another": [0, 1, 2, 3, 4, 0, 1],
    "beside none": [SLOTS, 3, 3, SLOTS, 1],
    "none": [SLOTS] * 6,
}


@pytest.fixture(params=["triton", "torch"])
def backend(request: pytest.FixtureRequest) -> None:
    if request.param == "torch":
        request.getfixturevalue("torch_backend")


def table(device: torch.device, width: int = WIDTH) -> Tensor:
    made = 1 + torch.randn(SLOTS + 1, width, generator=torch.Generator().manual_seed(0))
    made[SLOTS] = 1.0
    return made.to(device)


def slots_of(rows: list[int], device: torch.device) -> TokenSlots:
    slots = TokenSlots(TOKENS, SLOTS, device)
    slots.write(rows, lora=False)
    return slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.usefixtures("backend")
def test_scales_some_columns_in_place(step, dtype, device) -> None:
    rows, scales = STEPS[step], table(device)
    slots = slots_of(rows, device)
    x = torch.randn(len(rows), 10 + WIDTH + 6).to(device, dtype)
    y = x.clone()
    scale_slots_(y, 10, scales, slots.index, slots.state, slots.mixes)
    assert torch.equal(y[:, :10], x[:, :10]) and torch.equal(y[:, 10 + WIDTH :], x[:, 10 + WIDTH :])
    worn = scales[torch.tensor(rows, device=device)]
    inside = x[:, 10 : 10 + WIDTH]
    assert_meets_bar(y[:, 10 : 10 + WIDTH], (inside * worn).to(dtype), inside.double() * worn.double())
    assert torch.equal(y[torch.tensor(rows) == SLOTS], x[torch.tensor(rows) == SLOTS])


@pytest.mark.usefixtures("backend")
def test_leaves_the_input_as_it_is(device) -> None:
    rows, scales = STEPS["beside none"], table(device)
    slots = slots_of(rows, device)
    x = torch.randn(1, len(rows), WIDTH).to(device)
    kept = x.clone()
    y = scaled_slots(x, scales, slots.index, slots.state, slots.mixes)
    assert torch.equal(x, kept)
    assert torch.equal(y[0], x[0] * scales[torch.tensor(rows, device=device)])


@pytest.mark.parametrize("kind", ["silu", "gelu"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.usefixtures("backend")
def test_activation(step, kind, device) -> None:
    rows, scales = STEPS[step], table(device)
    slots = slots_of(rows, device)
    x = torch.randn(len(rows), 2 * WIDTH).to(device)
    y = activation_slots(x, scales, slots.index, slots.state, slots.mixes, kind)
    act = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}[kind]
    worn = scales[torch.tensor(rows, device=device)]

    def formula(x: Tensor, worn: Tensor) -> Tensor:
        return act(x[:, :WIDTH]) * x[:, WIDTH:] * worn

    assert_meets_bar(y, formula(x, worn), formula(x.double(), worn.double()))


@pytest.mark.usefixtures("backend")
def test_padding_wears_nothing(device) -> None:
    """A captured graph runs on more rows than the step has tokens, where an earlier, longer step left its own."""
    slots = slots_of([1] * TOKENS, device)
    slots.write([2, 3], lora=False)
    x = torch.randn(TOKENS, WIDTH).to(device)
    y = x.clone()
    scales = table(device)
    scale_slots_(y, 0, scales, slots.index, slots.state, slots.mixes)
    assert torch.equal(y[2:], x[2:]) and torch.equal(y[:2], x[:2] * scales[2:4])


def test_what_a_graph_reads_stays_where_it_is(device) -> None:
    slots = slots_of([1, 2], device)
    before = [tensor.data_ptr() for tensor in (slots.index, slots.state, slots.mixes)]
    slots.write([4] * 7, lora=True)
    assert [tensor.data_ptr() for tensor in (slots.index, slots.state, slots.mixes)] == before
    assert slots.lora and slots.state.tolist() == [1, 4]
    slots.write([SLOTS], lora=False)
    assert not slots.lora and slots.state.tolist()[0] == 0
    with pytest.raises(ValueError, match=f"{TOKENS + 1} tokens"):
        slots.write([0] * (TOKENS + 1), lora=False)


def test_ops_are_sound(torch_backend) -> None:
    slots = slots_of([0, 2, 5], torch.device("cpu"))
    arguments = (table(torch.device("cpu")), slots.index, slots.state, slots.mixes)
    torch.library.opcheck(scale_slots_.op, (torch.randn(3, 30), 4, *arguments))
    torch.library.opcheck(scaled_slots.op, (torch.randn(3, WIDTH), *arguments))
    torch.library.opcheck(activation_slots.op, (torch.randn(3, 2 * WIDTH), *arguments, "silu"))


def test_compiled(torch_backend) -> None:
    """What a step decides is read when it runs, not when it was compiled."""
    scales = table(torch.device("cpu"))
    slots = slots_of([SLOTS] * 3, torch.device("cpu"))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def layer(x: Tensor) -> Tensor:
        y = x + 1
        scale_slots_(y, 0, scales, slots.index, slots.state, slots.mixes)
        return y

    x = torch.randn(3, WIDTH)
    assert torch.equal(layer(x), x + 1)
    for rows in ([1, 1, 1], [0, SLOTS, 3]):
        slots.write(rows, lora=False)
        assert torch.equal(layer(x), (x + 1) * scales[torch.tensor(rows)])
