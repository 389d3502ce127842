"""The registry of a layer's operations, its roofline."""

from pathlib import Path

import pytest
import torch

from ia3rt.bench import markdown
from ia3rt.bench.document import roofline_table
from ia3rt.bench.layers import attention
from ia3rt.bench.layers.case import BY_ROW, FUSED, SEPARATE, UNADAPTED
from ia3rt.bench.layers.registry import CASES
from ia3rt.bench.roofline import H100, Card, Work, seconds
from ia3rt.bench.shapes import LLAMA_3_8B, TINY

CPU = torch.device("cpu")


def test_the_roofline_is_the_slower_of_memory_and_multiplication():
    card = Card(bytes_per_second=10.0, flops_per_second=100.0)
    assert seconds([Work(30, 100), Work(10, 900)], card) == 3 + 9


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_a_fused_vector_costs_less_than_a_pass_of_its_own(name, rows):
    ratios = CASES[name].predicted(LLAMA_3_8B, rows, H100)
    assert ratios[UNADAPTED] == 1
    assert ratios[FUSED] < ratios[SEPARATE] and ratios[SEPARATE] > 1


def test_the_key_value_projections_move_what_they_must():
    """By hand, for one row of Llama-3-8B in bf16: two weights, x, y and float32 vectors."""
    (fused,) = CASES["key and value projections"].work(LLAMA_3_8B, 1)[FUSED]
    assert fused.bytes == 2 * 4096 * 1024 * 2 + 4096 * 2 + 2 * 1024 * 2 + 2 * 1024 * 4
    assert fused.flops == 2 * 2 * 4096 * 1024


@pytest.mark.parametrize("name", CASES)
def test_every_way_computes_the_same(name, monkeypatch):
    """But for the vectors, which differ between ours and PEFT's, and which the unadapted layer lacks."""
    monkeypatch.setattr(attention, "PAST", 70)
    ways = CASES[name].ways(TINY, 5, CPU, torch.float32)
    fused, by_row, separate, unadapted = (flattened(ways[way](0)) for way in (FUSED, BY_ROW, SEPARATE, UNADAPTED))

    def differ(one: torch.Tensor, other: torch.Tensor) -> float:
        return ((one - other).abs().max() / other.abs().max()).item()

    assert differ(fused, separate) < 1e-5
    assert differ(by_row[:1], separate[:1]) < 1e-5  # row 0 wears what all wear there
    assert differ(by_row, separate) > 1e-2 < differ(unadapted, separate)


def flattened(result) -> torch.Tensor:
    parts = result if isinstance(result, (tuple, list)) else [result]
    return torch.cat([part.reshape(5, -1) for part in parts], dim=1)


def test_the_documented_roofline_is_that_of_the_cases():
    documented = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text("utf-8")
    assert roofline_table() in documented, "run python -m ia3rt.bench document"


def test_a_table_needs_its_place(tmp_path):
    file = tmp_path / "page.md"
    file.write_text("a\n<!-- sizes -->\nold\n<!-- end of sizes -->\nb\n")
    markdown.replace(file, "sizes", markdown.table(["x", "y"], [[1, 2]]))
    assert file.read_text() == "a\n<!-- sizes -->\n| x | y |\n| --- | ---: |\n| 1 | 2 |\n<!-- end of sizes -->\nb\n"
    with pytest.raises(ValueError, match="no place for times"):
        markdown.replace(file, "times", "")
