"""The study from end to end on tiny models, and that a run that was killed goes on to the same results."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_study
from rich.console import Console

from ia3rt.bench.study import run as running
from ia3rt.bench.study.asking import ModelAsking
from ia3rt.bench.study.cells import read_cells

MODELS = (tiny_study.TinyDecoder, tiny_study.TinyEncoder)
TABLES = ("methods", "tasks", "values", "domain", "negate", "analogy", "warning", "pairs", "correlations", "training")


def run(folder: Path) -> None:
    running.run(tiny_study.SCALE, MODELS, folder / "results", folder / "cache", Console(quiet=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        tiny_study.make_tasks(patch)
        run(folder)
    return folder


def test_it_runs(whole: Path) -> None:
    cells = read_cells(whole / "results" / "predictions.csv.gz")
    assert {each.model for each in cells} == {"tiny-decoder", "tiny-encoder"}
    for name in TABLES:
        assert (whole / "results" / f"{name}.csv").read_text("utf-8").strip(), name
