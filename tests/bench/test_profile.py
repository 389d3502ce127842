"""What a layer does, counted, against what the formulas say it must do."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from torch import nn

from ia3rt.bench.contenders.subject import Way
from ia3rt.bench.profile import above, memory
from ia3rt.bench.profile.counted import WEARINGS, Wearing, count, count_layers
from ia3rt.bench.profile.document import counted_table
from ia3rt.bench.shapes import SMOLLM2_135M

SITES = 3
"""k, v and down_proj."""


@pytest.fixture(scope="module")
def decoding():
    return count_layers()


def operations(counts) -> int:
    return sum(counts.operations.values())


def test_a_vector_is_one_operation_however_many_are_mixed(decoding, torch_backend) -> None:
    base = operations(decoding[Wearing("base")])
    for mixed in (1, 3, 16):
        assert operations(decoding[Wearing("ia3rt", mixed)]) == base + SITES
    by_row = decoding[Wearing("ia3rt", by_row=True)]
    assert operations(by_row) == operations(decoding[Wearing("base", by_row=True)]) + SITES


def test_peft_does_more_the_more_there_are(decoding) -> None:
    base = operations(decoding[Wearing("base")])
    for mixed in (1, 3):
        # A product of the vectors, beginning with ones, and that times the activation: at each site.
        assert operations(decoding[Wearing("peft", mixed)]) == base + SITES * (mixed + 1)


def test_a_layer_is_seven_matrices(decoding) -> None:
    for wearing in WEARINGS:
        assert decoding[wearing].operations["linear"] == 7, wearing


def test_what_is_formed_in_place_is_not_allocated(decoding) -> None:
    width = 4 * SMOLLM2_135M.intermediate  # act(gate) and its product with up, which the base model makes anew
    assert decoding[Wearing("base")].bytes - decoding[Wearing("ia3rt")].bytes == 2 * width


def test_counts_a_known_model() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Flatten()).eval()
    x = torch.ones(2, 3)

    def run(_: int) -> None:
        with torch.inference_mode():
            model(x)

    made = count(Way(run))
    assert dict(made.operations) == {"linear": 1, "relu": 1} or dict(made.operations) == {"addmm": 1, "relu": 1}
    assert made.modules == 4
    assert made.bytes == 2 * (2 * 5 * 4)


def test_memory_is_the_shapes() -> None:
    """57,600 and 524,288 numbers are what README says; a LoRA's are counted on a real layer by PEFT."""
    small, _, large = (memory.numbers(shape) for shape in memory.WHOLE)
    assert (small.ia3, large.ia3) == (57_600, 524_288)
    import peft

    config = peft.LoraConfig(r=memory.RANK, target_modules=["k_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(tiny_model(), config)
    counted = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    hidden, kv, intermediate, layers = 64, 32, 96, 2
    shape = SMOLLM2_135M.__class__("t", hidden, 4, 2, 16, intermediate, layers, 128)
    assert shape.kv_width == kv and memory.numbers(shape).lora == counted


def test_the_table_of_counts() -> None:
    told = {"ia3rt, 1 adapter": 24}
    lines = counted_table(told).splitlines()
    assert len(lines) == 2 + len(WEARINGS)
    (one,) = (line for line in lines if "ia3rt, 1 adapter" in line)
    assert "24 (" in one and "(+3)" in one


def test_operators_are_sorted_by_what_they_add() -> None:
    taken = {"base": {"a": 10.0, "b": 5.0}, "peft": {"a": 12.0, "c": 9.0}, "ia3rt": {"a": 10.0, "b": 6.0}}
    from collections import Counter

    rows = above.table_rows({name: Counter(made) for name, made in taken.items()})
    assert [row[0] for row in rows] == ["c", "b", "a", "all operators"]
    assert rows[0] == ("c", "0", "+9", "+0") and rows[-1] == ("all operators", "15", "+6", "+1")
