"""The study from end to end on tiny models: what it writes, and that a run that was killed goes on to the same."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import tiny_study
import torch
from rich.console import Console
from tiny import tiny_model
from typer.testing import CliRunner

from ia3rt.adapters.combining.combination import Combination
from ia3rt.bench.__main__ import app
from ia3rt.bench.study import adapters, asking, cells, document, models, phases, tables
from ia3rt.bench.study import run as running
from ia3rt.bench.study.cells import Cell, read_cells, read_table
from ia3rt.bench.study.cli import RESULTS
from ia3rt.bench.study.methods import DEFAULTS, METHODS
from ia3rt.bench.study.sets import all_sets, cycle
from ia3rt.bench.study.tasks import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "combining.md"
MODELS = (tiny_study.TinyDecoder, tiny_study.TinyEncoder)
SCALE = tiny_study.SCALE


def run(folder: Path) -> None:
    running.run(SCALE, MODELS, folder / "results", folder / "cache", Console(quiet=True))


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as made:
        tiny_study.make_tasks(made)
        yield made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def written(folder: Path) -> dict[str, bytes]:
    """All that a run wrote, but for when and where it ran."""
    files = [file for file in (folder / "results").rglob("*") if file.is_file() and file.name != "run.json"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_run_that_is_killed_goes_on_to_the_same_results(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it trains, and while it asks; then all is known, and nothing is trained or asked again."""
    count = {"train": 0, "score": 0}
    real_train, real_score = adapters.train, asking.score

    def train(*given: object) -> object:
        count["train"] += 1
        if count["train"] == 4:
            raise KeyboardInterrupt
        return real_train(*given)

    def score(*given: object) -> object:
        count["score"] += 1
        if count["score"] in (30, 400):
            raise KeyboardInterrupt
        return real_score(*given)

    monkeypatch.setattr(adapters, "train", train)
    monkeypatch.setattr(asking, "score", score)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert not (tmp_path / "results" / "predictions.csv.gz").exists()
    run(tmp_path)
    assert written(tmp_path) == written(whole)
    before = dict(count)
    run(tmp_path)
    assert count == before
    assert written(tmp_path) == written(whole)


def test_every_set_is_asked_with_every_method(whole: Path) -> None:
    found = read_cells(whole / "results" / "predictions.csv.gz")
    for model in MODELS:
        tested = {(c.adapters, c.method, c.seed, c.task) for c in found if c.model == model.name and c.phase == "test"}
        assert tested == {
            (tasks, method.name, seed, task)
            for tasks in all_sets(SCALE.main)
            for method in METHODS
            if method.takes(len(tasks))
            for seed in SCALE.seeds
            for task in tasks
        }
    assert {each.split for each in found if each.phase == "tuning"} == {"validation"}
    assert {each.split for each in found if each.phase in ("alone", "test", "defaults", "domain", "negate")} == {"test"}


@pytest.mark.parametrize("kind", ["tiny", "recorded"])
def test_what_is_written_is_what_was_answered(kind: str, request: pytest.FixtureRequest) -> None:
    """Right answers by the labels of texts.csv, and the means of methods.csv and defaults.csv by those."""
    results = RESULTS if kind == "recorded" else request.getfixturevalue("whole") / "results"
    labels: dict[tuple[str, str], str] = {}
    for row in read_table(results / "texts.csv"):
        key = row["task"], row["split"]
        labels[key] = labels.get(key, "") + row["label"]
    found = read_cells(results / "predictions.csv.gz")
    for each in found:
        right = zip(each.predicted, labels[each.task, each.split], strict=False)
        assert each.right == "".join(str(int(one == other)) for one, other in right)
    for row in read_table(results / "methods.csv"):
        if not row["values"]:  # what is compared with is of other cells
            continue
        tested = [c for c in found if c.model == row["model"] and c.phase == "test" and c.method == row["method"]]
        accuracy = mean_over_tasks(tested, int(row["size"]))
        assert float(row["accuracy"]) == pytest.approx(accuracy, abs=1e-6)
        products = [c for c in found if c.model == row["model"] and c.phase == "test" and c.method == "product"]
        over = accuracy - mean_over_tasks(products, int(row["size"]))
        assert float(row["over_product"]) == pytest.approx(over, abs=1e-6)
        texts = {c.task: len(c.right) for c in tested if len(c.adapters) == int(row["size"])}
        owns = [c for c in found if (c.model, c.phase, c.method) == (row["model"], "alone", "routing")]
        alone = [c for c in owns if c.task in texts]
        own = statistics.mean(statistics.mean(map(int, c.right[: texts[c.task]])) for c in alone)
        chance = statistics.mean(1 / len(TASKS[task].labels) for task in texts)
        assert float(row["routing_over"]) == pytest.approx(own - accuracy, abs=1e-6)
        if own > chance:
            assert float(row["kept"]) == pytest.approx((accuracy - chance) / (own - chance), abs=1e-6)
    for row in read_table(results / "defaults.csv"):
        asked = [c for c in found if c.model == row["model"] and c.phase == "defaults" and c.method == row["method"]]
        for name in ("usual", "other"):
            cells = [c for c in asked if c.values == json.loads(row[name])]
            assert float(row[f"accuracy_of_{name}"]) == pytest.approx(
                mean_over_tasks(cells, int(row["size"])), abs=1e-6
            )


def mean_over_tasks(cells: list[Cell], size: int) -> float:
    by_task: dict[str, list[float]] = {}
    for each in cells:
        if len(each.adapters) == size:
            by_task.setdefault(each.task, []).append(each.accuracy)
    return statistics.mean(map(statistics.mean, by_task.values()))


def test_the_recorded_texts_are_in_one_split_each() -> None:
    rows = read_table(RESULTS / "texts.csv")
    keys = {split: {row["key"] for row in rows if row["split"] == split} for split in ("validation", "test")}
    assert len(keys["validation"]) + len(keys["test"]) == len(rows) and keys["validation"].isdisjoint(keys["test"])


def test_values_are_the_best_of_validation() -> None:
    def cell(method: str, weight: float, right: str, task: str) -> Cell:
        values = {"weight": weight}
        return Cell("m", "tuning", ("movie", "author"), method, values, 0, task, "validation", right, right)

    first, second = (values["weight"] for values in phases.grid_of(METHODS[2], SCALE))
    asked = [cell("delta", first, "11", "movie"), cell("delta", first, "00", "author")]
    asked += [cell("delta", second, "10", "movie"), cell("delta", second, "11", "author")]
    assert phases.choose(asked, SCALE)["delta", 2] == {"weight": second}
    assert phases.choose(asked[:2] + asked[3:], SCALE)["delta", 2] == {"weight": second}
    assert phases.choose(asked, SCALE)["product", 2] == {}


def test_sets() -> None:
    assert [len(each) for each in all_sets("abcde")] == [2] * 10 + [3] * 10 + [5]
    assert all_sets("abc") == [("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")]
    assert cycle("abcde", 2) == [("a", "b"), ("b", "c"), ("c", "d"), ("d", "e"), ("e", "a")]
    assert cycle("abcde", 5) == [tuple("abcde")]


@pytest.mark.parametrize("task", ["movie", "author", "news"])
def test_what_is_published_is_what_was_tested_and_peft_loads_it(whole: Path, task: str) -> None:
    folder = whole / "results" / "adapters" / "tiny-decoder" / f"{task}-1"
    wrapped = peft.PeftModel.from_pretrained(tiny_model(), folder).eval()
    found = read_cells(whole / "results" / "predictions.csv.gz")
    (cell,) = (c for c in found if (c.model, c.phase, c.adapters, c.seed) == ("tiny-decoder", "alone", (task,), 1))
    model = tiny_study.TinyDecoder.load(torch.float32)
    texts, _ = running.read_texts(SCALE, lambda package: Path())
    asked = model.prompts(task, texts[task].test[: len(cell.right)], SCALE.length)
    labels = [tiny_study.Words().encode(label)[0] for label in TASKS[task].labels]
    with torch.no_grad():
        answers = [int(wrapped(torch.tensor([each.ids])).logits[0, -1, labels].argmax()) for each in asked]
    assert "".join(map(str, answers)) == cell.predicted
    card = (folder / "README.md").read_text("utf-8")
    assert f"accuracy {cell.accuracy:.3f} on {len(cell.right)} test texts" in card


def test_the_page_has_a_place_for_each_table(whole: Path, tmp_path: Path) -> None:
    page = tmp_path / "combining.md"
    page.write_text(PAGE.read_text("utf-8"), "utf-8")
    document.write_page(page, whole / "results")
    once = page.read_text("utf-8")
    for content in tables.tables(whole / "results").values():
        assert content in once
    for plot in re.findall(r"\]\((combining/.*?\.svg)\)", once):
        assert (tmp_path / plot).read_bytes().startswith(b"<?xml")
    drawn = {file: file.read_bytes() for file in (tmp_path / "combining").iterdir()}
    document.write_page(page, whole / "results")
    assert page.read_text("utf-8") == once
    assert {file: file.read_bytes() for file in (tmp_path / "combining").iterdir()} == drawn


def test_a_tables_cell_is_the_files_number(whole: Path) -> None:
    rows = [row for row in read_table(whole / "results" / "methods.csv") if row["model"] == "tiny-encoder"]
    shown = tables.tables(whole / "results")["study points"]
    for row in rows:
        if row["method"] == "ties":
            assert f"{100 * float(row['over_product']):+.1f}" in shown
    warned = read_table(whole / "results" / "warning.csv")
    for row in warned:
        assert f"{100 * float(row['accuracy']):.0f} (" in tables.tables(whole / "results")["study warning"]


def test_the_page_is_what_the_files_say(tmp_path: Path) -> None:
    page = tmp_path / PAGE.name
    page.write_text(PAGE.read_text("utf-8"), "utf-8")
    document.write_page(page, RESULTS)
    assert page.read_text("utf-8") == PAGE.read_text("utf-8"), "run python -m ia3rt.bench recorded"


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, int, str], dict[str, str]]:
    """The recorded methods.csv, by model, size and method."""
    rows = read_table(RESULTS / "methods.csv")
    return {(row["model"], int(row["size"]), row["method"]): row for row in rows}


def above_the_product(row: dict[str, str]) -> bool:
    return bool(row["p_holm"]) and float(row["p_holm"]) < 0.05 and float(row["over_product_low"]) > 0


Found = dict[tuple[str, int, str], dict[str, str]]


@pytest.mark.parametrize("model", [kind.name for kind in models.MODELS])
def test_what_the_page_tells_to_choose_is_what_the_files_say(found: Found, model: str) -> None:
    ways = {name for _, _, name in found} - {"routing", "base", "joint", "product"}
    for size in (2, 3, 5):
        over = {
            name: float(found[model, size, name]["routing_over_low"]) for name in ways if (model, size, name) in found
        }
        assert min(over.values()) > 0, "routing beats every way"
    of_model = {(size, name): row for (each, size, name), row in found.items() if each == model}
    better = {
        s: {name for (size, name), row in of_model.items() if size == s and above_the_product(row)} for s in (2, 5)
    }
    assert better[2] == set()
    assert better[5] >= {"delta", "power"}
    assert 0.5 <= json.loads(found[model, 5, "delta"]["values"])["weight"] <= 0.85


def test_what_the_default_of_delta_does_beside_the_product() -> None:
    """4 points with five, in both models, as the page and the README say."""
    rows = [row for row in read_table(RESULTS / "defaults.csv") if (row["method"], row["size"]) == ("delta", "5")]
    assert [round(100 * float(row["over_product"])) for row in rows] == [4, 4]
    assert all(float(row["over_product_low"]) > 0 for row in rows)
    told = {
        PAGE.parents[1] / "README.md": "it was right 4 points more often than the product",
        PAGE: "it was 4 points above",
    }
    for file, words in told.items():
        assert words in " ".join(file.read_text("utf-8").split())


def test_what_is_significant_in_one_model_only(found: Found) -> None:
    first, second = (kind.name for kind in models.MODELS)
    for size in (2, 3):
        rows = {model: found[model, size, "linear"] for model in (first, second)}
        assert float(rows[first]["p_holm"]) < 0.05 and float(rows[first]["over_product_high"]) < 0
        assert float(rows[second]["p_holm"]) > 0.05
    assert not above_the_product(found[first, 3, "delta"]) and above_the_product(found[second, 3, "delta"])
    pruning = {"ties", "max_abs", "dare_ties", "dare_linear", "magnitude_prune", "fisher"}
    assert {name for name in pruning if above_the_product(found[first, 5, name])} == {"magnitude_prune"}
    assert {name for name in pruning if above_the_product(found[second, 5, name])} == pruning - {"magnitude_prune"}
    for model, size, points in ((first, 2, 3), (first, 5, 12), (second, 2, 2), (second, 5, 6)):
        merged = [row for (*where, _), row in found.items() if where == [model, size] and row["values"]]
        assert round(100 * min(float(row["routing_over"]) for row in merged)) == points


def test_the_defaults_are_what_was_significantly_better() -> None:
    """In both models at some size, and worse in none."""
    rows = read_table(RESULTS / "defaults.csv")
    better: dict[str, dict[str, bool]] = {}
    worse = set()
    for row in rows:
        is_significant = float(row["p_holm"]) < 0.05
        if is_significant and float(row["difference_low"]) > 0:
            better.setdefault(row["method"], {})[row["model"]] = True
        elif is_significant and float(row["difference_high"]) < 0:
            worse.add(row["method"])
    taken = {method for method, by_model in better.items() if len(by_model) == 2 and method not in worse}
    assert taken == {"delta", "ties"}
    for method, option in (("delta", "weight"), ("ties", "density")):
        value = DEFAULTS[method][1][option]
        default = Combination(["a", "b"], None, method)  # type: ignore[arg-type]
        assert value == (default.density if option == "density" else default.used_weights[0])


def test_cells_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = [
        Cell("m", "test", ("a", "b"), "ties", {"density": 0.2, "weight": 1.0}, 0, "a", "test", "0120", "1010"),
        Cell("m", "alone", (), "base", {}, 1, "a", "test", "0", "1"),
    ]
    cells.write_cells(written, tmp_path / "one")
    cells.write_cells(written, tmp_path / "other")
    assert read_cells(tmp_path / "one") == written
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert written[0].accuracy == 0.5


def test_what_ran_is_said(whole: Path) -> None:
    facts = json.loads((whole / "results" / "run.json").read_text("utf-8"))
    assert facts["left_out"] == {}
    assert facts["seconds"].keys() >= {"tiny-decoder: train movie", "tiny-encoder: sets"}
    for seen in facts["seen"].values():
        assert seen["mixed"]["rows"] > 10
        assert seen["mixed"]["largest"] < (1e-4 if seen["answers in"] == "torch.float32" else 0.5)
    curve = read_table(whole / "results" / "curve.csv")
    assert [row["step"] for row in curve] == ["1", "2"]
    for row in curve:
        assert float(row["ia3rt"]) == pytest.approx(float(row["peft"]), abs=1e-4)
    courses = {(row["model"], row["adapter"]) for row in read_table(whole / "results" / "training.csv")}
    published = {(each.parent.name, each.name) for each in (whole / "results" / "adapters").glob("*/*")}
    assert courses == published


def test_the_command() -> None:
    shown = CliRunner().invoke(app, ["study", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    for option in ("--quick", "--cache", "--out", "--page"):
        assert option in shown.output


def test_a_full_run_without_its_page_ends_before_it_begins(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["study", "--page", str(tmp_path / "none.md")], env={"COLUMNS": "200"})
    assert shown.exit_code == 2
    assert "run it in the repository" in shown.output
