"""The ops that scale tokens by their slots' rows: kernels in the interpreter and plain torch, against float64."""

from __future__ import annotations

import pytest
import torch
from bar import assert_meets_bar
from torch import Tensor

from ia3rt.serving.vllm.slot_ops import activation_slots, linear_slots, scale_slots_, scaled_slots
from ia3rt.serving.vllm.slots import TokenSlots

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
def test_scales_in_place(step, dtype, device) -> None:
    rows, scales = STEPS[step], table(device)
    slots = slots_of(rows, device)
    x = torch.randn(len(rows), WIDTH).to(device, dtype)
    y = x.clone()
    scale_slots_(y, scales, slots.index, slots.active, slots.mixes)
    worn = scales[torch.tensor(rows, device=device)]
    assert_meets_bar(y, (x * worn).to(dtype), x.double() * worn.double())
    assert torch.equal(y[torch.tensor(rows) == SLOTS], x[torch.tensor(rows) == SLOTS])


@pytest.mark.usefixtures("backend")
def test_leaves_the_input_as_it_is(device) -> None:
    rows, scales = STEPS["beside none"], table(device)
    slots = slots_of(rows, device)
    x = torch.randn(1, len(rows), WIDTH).to(device)
    kept = x.clone()
    y = scaled_slots(x, scales, slots.index, slots.active, slots.mixes)
    assert torch.equal(x, kept)
    assert torch.equal(y[0], x[0] * scales[torch.tensor(rows, device=device)])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.usefixtures("backend")
def test_linear(step, bias, device) -> None:
    rows, scales = STEPS[step], table(device)
    slots = slots_of(rows, device)
    x, weight = torch.randn(len(rows), 48).to(device), torch.randn(WIDTH, 48).to(device)
    b = torch.randn(WIDTH).to(device) if bias else None
    y = linear_slots(x, weight, b, scales, slots.index, slots.active, slots.mixes)
    worn = scales[torch.tensor(rows, device=device)]
    truth = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double()) * worn.double()
    assert_meets_bar(y, torch.nn.functional.linear(x, weight, b) * worn, truth)


@pytest.mark.parametrize("kind", ["silu", "gelu"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.usefixtures("backend")
def test_activation(step, kind, device) -> None:
    rows, scales = STEPS[step], table(device)
    slots = slots_of(rows, device)
    x = torch.randn(len(rows), 2 * WIDTH).to(device)
    y = activation_slots(x, scales, slots.index, slots.active, slots.mixes, kind)
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
    scale_slots_(y, scales, slots.index, slots.active, slots.mixes)
    assert torch.equal(y[2:], x[2:]) and torch.equal(y[:2], x[:2] * scales[2:4])


def test_ops_are_sound(torch_backend) -> None:
    slots = slots_of([0, 2, 5], torch.device("cpu"))
    arguments = (table(torch.device("cpu")), slots.index, slots.active, slots.mixes)
    torch.library.opcheck(scale_slots_.op, (torch.randn(3, WIDTH), *arguments))
    torch.library.opcheck(scaled_slots.op, (torch.randn(3, WIDTH), *arguments))
    torch.library.opcheck(linear_slots.op, (torch.randn(3, 8), torch.randn(WIDTH, 8), None, *arguments))
    torch.library.opcheck(activation_slots.op, (torch.randn(3, 2 * WIDTH), *arguments, "silu"))
