"""What bench/results keeps, and that the documents say it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ia3rt.bench import recorded
from ia3rt.bench.layers.case import BY_ROW, FUSED, ROWS, SEPARATE, UNADAPTED
from ia3rt.bench.layers.registry import CASES

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("mode", [recorded.GRAPH, recorded.EAGER])
def test_every_prediction_has_a_measurement_beside_it(mode: str) -> None:
    ratios = recorded.layer_times(mode, "ratio")
    for name in CASES:
        for rows in ROWS:
            assert ratios[name, rows].keys() >= {FUSED, BY_ROW, UNADAPTED, SEPARATE}
            assert ratios[name, rows][UNADAPTED] == 1


@pytest.mark.parametrize("document", ["kernels.md", "performance.md"])
def test_the_documents_tables_are_those_of_the_files(document: str, tmp_path: Path) -> None:
    written = tmp_path / document
    written.write_text((DOCS / document).read_text("utf-8"), "utf-8")
    {"kernels.md": recorded.write_kernels, "performance.md": recorded.write_performance}[document](written)
    assert written.read_text("utf-8") == (DOCS / document).read_text("utf-8"), "run python -m ia3rt.bench recorded"


def test_the_tables_of_a_layer(tmp_path: Path) -> None:
    taken = {"graph": {UNADAPTED: 1e-5, FUSED: 5e-6}, "eager": {UNADAPTED: 2e-4, FUSED: 3e-4}}

    def time(mode: str, way: str, p50: float) -> dict:
        return dict(case="MLP", rows=16, mode=mode, way=way, p20=0.0, p50=p50, p80=0.0, ratio=p50 / 1e-5)

    times = [time(mode, way, p50) for mode, ways in taken.items() for way, p50 in ways.items()]
    (tmp_path / "layers.json").write_text(json.dumps(times))
    assert recorded.layer_times("graph", "ratio", tmp_path) == {("MLP", 16): {UNADAPTED: 1.0, FUSED: 0.5}}
    assert recorded.layer_times("eager", "p50", tmp_path)["MLP", 16][FUSED] == 3e-4


def test_the_best_of_a_sweep_may_be_what_was_there(tmp_path: Path) -> None:
    sizes = [{"bf16": 10.0, "default": 12.0, "(16,)": 15.0, "(32,)": 8.0}, {"bf16": 10.0, "default": 7.0, "(16,)": 8.0}]
    sweep = [dict(kind="int8", N=1024, K=4096, rows=1, us=us) for us in sizes]
    (tmp_path / "quantised-sweep.json").write_text(json.dumps(sweep))
    lines = recorded.quantised_table(tmp_path).splitlines()
    assert lines[2:] == [
        "| int8 | 4,096 → 1,024 | 1 | 10.0 | 12.0 | 8.0 | 1.20 | 0.80 |",
        "| int8 | 4,096 → 1,024 | 1 | 10.0 | 7.0 | 7.0 | 0.70 | 0.70 |",
    ]


def test_a_model_that_was_not_timed_leaves_its_cell_empty(tmp_path: Path) -> None:
    made = [
        dict(what="decode", rows=4, length=8, worn=worn, mode=mode, ratio={"base": 1, "ia3rt": ours, **peft})
        for worn, peft in (("one", {"peft": 1.5}), ("rows", {}))
        for mode, ours in (("eager", 1.25), ("graph", 0.5))
    ]
    (tmp_path / "model.json").write_text(json.dumps(made))
    assert recorded.model_table("model.json", tmp_path).splitlines()[2:] == [
        "| decode, 4 × 8, one adapter | 1.500 / 1.500 | 0.500 / 1.250 |",
        "| decode, 4 × 8, one of 16 adapters a row |  | 0.500 / 1.250 |",
    ]
