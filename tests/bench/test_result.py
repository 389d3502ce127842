"""What a run leaves behind: JSON, CSV and HTML; comparing two runs; and keeping a budget."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import random
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ia3rt.bench import budget as budgets
from ia3rt.bench import readable, terminal
from ia3rt.bench.budget import Rule, check, read_budget
from ia3rt.bench.compare import compare
from ia3rt.bench.profile.document import measured_table, scale_table, times_table
from ia3rt.bench.report import svg, write_html
from ia3rt.bench.result import CaseResult, Measurement, Result, read_json, write_csv, write_json
from ia3rt.bench.suites.registry import SUITES
from ia3rt.cli.main import app

BASE = [1.0, 1.1, 0.9, 1.0, 1.05]
STEADY, SHAKY = [1.0] * 5, [1.0, 1.5, 0.7, 1.0, 1.3]


def case(ratio: float, shape: list[float] = STEADY, suite: str = "forward", what: str = "decode", rows: int = 1):
    """A case in which ia3rt takes `ratio` of the base model, each round by a factor of `shape`."""
    ours = [base * ratio * factor for base, factor in zip(BASE, shape, strict=True)]
    measurements = [
        Measurement.of("base", BASE, None),
        Measurement.of("peft", [2 * base for base in BASE], BASE, note="in two <steps>"),
        Measurement.of("ia3rt", ours, BASE),
    ]
    parameters = {"rows": rows, "length": 8}
    name = f"{what} rows={rows} length=8"
    return CaseResult(
        suite, what, parameters, name, "base", "tokens", rows, measurements, {"merged": "it is not <here>"}
    )


def controlled(ratio: float, control: float, shape: list[float] = STEADY) -> CaseResult:
    """The case, with a second copy of the base model that took `control` of the first."""
    again = [base * control * factor for base, factor in zip(BASE, shape, strict=True)]
    return dataclasses.replace(case(ratio), control=Measurement.of("control", again, BASE))


def result(*cases: CaseResult, **changes) -> Result:
    machine = {
        "processor": "Abacus <1>",
        "cores": 2,
        "memory_bytes": 4_000_000_000,
        "platform": "Linux",
        "devices": [],
        "torch_threads": 1,
        "load_average": 0.5,
    }
    made = Result(
        "2026-01-01T00:00:00Z",
        "ia3rt bench",
        "tiny, random weights",
        "cpu",
        "float32",
        320,
        ["base", "peft", "ia3rt"],
        machine,
        {"python": "3", "triton": None},
        list(cases),
        {"kernels": "the kernels run on a GPU only"},
    )
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize(
    ("value", "text"), [(2.5, "2.50 s"), (0.0123, "12.3 ms"), (4.56e-6, "4.56 µs"), (0.1234, "123 ms"), (0, "0 µs")]
)
def test_seconds(value: float, text: str) -> None:
    assert readable.seconds(value) == text


def test_json_there_and_back(tmp_path: Path) -> None:
    written = result(case(1.2), case(1.0, SHAKY, rows=4))
    write_json(written, tmp_path / "a.json")
    assert read_json(tmp_path / "a.json").as_dict() == json.loads(json.dumps(written.as_dict()))
    noise = [m["noise"] for c in json.loads((tmp_path / "a.json").read_text())["cases"] for m in c["measurements"]]
    assert noise == [False, False, False, False, False, True]


@pytest.mark.parametrize("content", ["not json", "[]", '{"schema": 99}', '{"schema": 1}'])
def test_json_of_something_else(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_csv_has_a_line_for_each_contender_and_no_noise(tmp_path: Path) -> None:
    write_csv(result(case(1.2), case(1.0, SHAKY, rows=4)), tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["contender"] for line in lines] == ["base", "peft", "ia3rt"] * 2
    assert float(lines[2]["ratio_p50"]) == pytest.approx(1.2)
    assert (lines[5]["noise"], lines[5]["ratio_p50"]) == ("True", "")
    assert float(lines[0]["per_second"]) == pytest.approx(1.0)


def printed(made: Result) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    terminal.print_result(console, made)
    return console.export_text()


def test_noise_is_not_printed() -> None:
    output = printed(result(case(1.25), case(1.37, SHAKY, rows=4)))
    assert "1.25 ×" in output and "2.00 ×" in output
    assert "noise" in output and "1.37 ×" not in output
    assert "without merged: it is not <here>" in output
    assert "kernels: the kernels run on a GPU only" in output


@pytest.mark.parametrize("width", [30, 50, 60, 80, 120])
def test_a_narrow_terminal_shows_whole_words(width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    terminal.print_result(console, result(dataclasses.replace(controlled(1.25, 1.04), unit="tokens of text")))
    terminal.print_changes(console, compare(result(case(1.0)), result(case(1.25))))
    output = console.export_text()
    for word in ("decode", "rows=1", "length=8", "ia3rt", "1.25 ×", "1.25 s", "reference", "control", "slower"):
        assert word in output, word
    assert "…" not in output.replace("0.7 … 1.5", "")


def test_failures_are_printed() -> None:
    assert "ia3rt: broke" in printed(result(dataclasses.replace(case(1), failed={"ia3rt": "broke"})))


class Links(HTMLParser):
    """Everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def test_the_report_is_whole_and_opens_offline(tmp_path: Path) -> None:
    cases = [case(1.2, rows=rows) for rows in (1, 8, 64)] + [case(1.0, SHAKY, what="prefill")]
    write_html(result(*cases), tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    parser = Links()
    parser.feed(text)
    assert not parser.open
    assert len(parser.links) == 1 and all(link.startswith("data:image/svg+xml;base64,") for link in parser.links)
    assert "http" not in text and "@import" not in text and "<script" not in text
    picture = base64.b64decode(parser.links[0].partition(",")[2]).decode()
    fetched = re.findall(r'(?:xlink:)?href="([^"]*)"', picture)
    assert "<svg" in picture and all(link.startswith("#") for link in fetched)
    for expected in ("Abacus &lt;1&gt;", "1.20 ×", "it is not &lt;here&gt;", "in two &lt;steps&gt;", "off by"):
        assert expected in text
    assert SUITES["forward"].about in text


def test_plots_of_one_case_and_of_many() -> None:
    assert b"<svg" in svg([case(1.0)], "rows")
    assert b"<svg" in svg([case(1.0, rows=rows) for rows in (1, 2)], "rows")
    assert svg([dataclasses.replace(case(1.0), measurements=[])], "rows") == b""


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (case(1.0), case(1.05), "same"),
        (case(1.0), case(1.3), "slower"),
        (case(1.3), case(1.0), "faster"),
        (case(1.0), case(1.15, SHAKY), "noise"),
        (case(1.0, SHAKY), case(1.15), "noise"),
        (case(1.0), case(3.0, SHAKY), "slower"),  # even the fastest of what is noise took twice as long
        (case(3.0, SHAKY), case(1.0, SHAKY), "faster"),
    ],
)
def test_compare(before: CaseResult, after: CaseResult, verdict: str) -> None:
    changes = {change.contender: change for change in compare(result(before), result(after))}
    assert changes["ia3rt"].verdict == verdict
    assert changes["ia3rt"].is_regression == (verdict == "slower")
    assert changes["peft"].verdict == "same"


def test_peft_becoming_slower_is_no_regression() -> None:
    slower = case(1.0)
    slower.measurements[1] = Measurement.of("peft", [4 * base for base in BASE], BASE)
    changes = {change.contender: change for change in compare(result(case(1.0)), result(slower))}
    assert changes["peft"].verdict == "slower" and not changes["peft"].is_regression


WITHOUT_OURS = [measured for measured in case(1.0).measurements if measured.contender != "ia3rt"]
STOPPED = {"forward: decode rows=4 length=8": "the run was stopped"}


@pytest.mark.parametrize(
    ("after", "not_run", "verdict"),
    [
        (dataclasses.replace(case(1.0, rows=4), measurements=WITHOUT_OURS, failed={"ia3rt": "broke"}), {}, "failed"),
        (dataclasses.replace(case(1.0, rows=4), measurements=[], failed={"the case": "broke"}), {}, "failed"),
        (dataclasses.replace(case(1.0, rows=4), measurements=WITHOUT_OURS), {}, "missing"),
        (None, {}, "missing"),
        (None, STOPPED, "not compared"),
        (None, {"forward": "it needs a GPU"}, "not compared"),
        (dataclasses.replace(case(1.0, rows=4), reference="peft"), {}, "not compared"),  # the base model failed, say
    ],
)
def test_what_was_measured_and_is_no_more(after: CaseResult | None, not_run, verdict: str) -> None:
    now = result(case(1.0), *([after] if after else []), not_run=not_run)
    changes = [change for change in compare(result(case(1.0), case(1.0, rows=4)), now) if change.contender == "ia3rt"]
    assert [change.verdict for change in changes] == ["same", verdict]
    assert [change.is_regression for change in changes] == [False, verdict != "not compared"]
    console = Console(width=200, record=True, file=io.StringIO())
    terminal.print_changes(console, changes)
    assert verdict in console.export_text()


def test_a_failure_in_the_only_case_is_told() -> None:
    failed = dataclasses.replace(case(1.0), measurements=WITHOUT_OURS, failed={"ia3rt": "broke"})
    assert [change.verdict for change in compare(result(case(1.0)), result(failed))] == ["same", "failed"]


def test_runs_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="dtype 'float32', the other of 'bfloat16'"):
        compare(result(case(1)), result(case(1), dtype="bfloat16"))
    with pytest.raises(ValueError, match="no ratio in common"):
        compare(result(case(1)), result(case(1, what="prefill")))


@pytest.mark.parametrize(("after", "code"), [(1.02, 0), (1.5, 1), (0.5, 0)])
def test_the_command_compare(after: float, code: int, tmp_path: Path) -> None:
    write_json(result(case(1.0)), tmp_path / "a.json")
    write_json(result(case(after)), tmp_path / "b.json")
    done = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, ["bench", "compare", *(str(tmp_path / f"{x}.json") for x in "ab")]
    )
    assert done.exit_code == code, done.output
    assert f"{after:.3g} ×" in done.output


RULE = Rule("forward", "decode *", "ia3rt", "base", 1.3)


def test_a_budget_that_is_kept_and_one_that_breaks() -> None:
    assert check(result(case(1.2)), [RULE]) == ([], [])
    (broken,), idle = check(result(case(1.2), case(1.5, rows=4)), [RULE])
    assert not idle and broken.case == "decode rows=4 length=8"
    assert "may take 1.3" in str(broken)


def test_noise_breaks_a_budget_only_where_all_of_it_is_too_much() -> None:
    assert check(result(case(1.35, SHAKY)), [RULE]) == ([], [])
    assert len(check(result(case(9.0, SHAKY)), [RULE])[0]) == 1


def test_rules_without_a_case_are_named() -> None:
    others = [dataclasses.replace(RULE, suite="train"), dataclasses.replace(RULE, reference="peft")]
    assert check(result(case(1.2)), [RULE, *others]) == ([], others)


def test_the_budget_of_ci_fits_the_quick_cases() -> None:
    for rule in read_budget(Path(budgets.__file__).with_name("budget.json")):
        made = [case for case in SUITES[rule.suite].cases(True) if budgets.fnmatch.fnmatchcase(case.name, rule.case)]
        assert made, rule
        assert all(case.references[0] == rule.reference for case in made), rule


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"rules": []}',
        '{"rules": [{"suite": "forward"}]}',
        '{"rules": [{"suite": "a", "case": "b", "contender": "c", "reference": "d", "most": 0}]}',
    ],
)
def test_what_is_no_budget(content: str, tmp_path: Path) -> None:
    (tmp_path / "budget.json").write_text(content)
    with pytest.raises(ValueError, match="is not a budget"):
        read_budget(tmp_path / "budget.json")


@pytest.mark.parametrize(
    ("ratio", "control", "shape", "within"),
    [
        (1.03, 1.04, STEADY, True),  # no further from 1 than a second copy of the base model
        (0.97, 1.04, STEADY, True),
        (1.05, 1.04, STEADY, False),
        (1.03, 1.0, STEADY, False),
        (1.03, 1.0, [1.0, 1.06, 0.94, 1.0, 1.05], True),  # the control itself may be that far off by chance
    ],
)
def test_a_ratio_is_held_against_the_control(ratio, control, shape, within, tmp_path) -> None:
    made = result(controlled(ratio, control, shape))
    (measured,) = (m for m in made.cases[0].measurements if m.contender == "ia3rt")
    assert measured.is_within(made.cases[0].control) == within
    console = Console(record=True, width=200)
    terminal.print_result(console, made)
    printed = console.export_text()
    assert "control" in printed and ("within noise" in printed.split("control")[0]) == within
    write_json(made, tmp_path / "a.json")
    write_csv(made, tmp_path / "a.csv")
    write_html(made, tmp_path / "a.html")
    assert read_json(tmp_path / "a.json").as_dict() == json.loads(json.dumps(made.as_dict()))
    assert "control" in (tmp_path / "a.csv").read_text() and "control" in (tmp_path / "a.html").read_text()


def test_a_documents_table_has_the_control() -> None:
    command = "ia3rt bench forward --against base,ia3rt --out a/folder"
    table = measured_table(result(controlled(1.2, 1.04), controlled(0.97, 1.04), command=command))
    assert "`ia3rt bench forward --against base,ia3rt`" in table
    row = "| forward: decode rows=1 length=8 | 2.00 |"
    assert f"{row} 1.20 | 1.040 (± 0.040) |" in table and f"{row} 0.970 ° | 1.040 (± 0.040) |" in table


def test_a_table_of_times_has_the_ratios_beside_them() -> None:
    table = times_table(result(controlled(1.2, 1.04), command="ia3rt bench switch --out a/folder"))
    assert "`ia3rt bench switch`" in table
    assert "| case | base | peft | ia3rt | peft × base | ia3rt × base | control |" in table
    row = table.splitlines()[-1]
    assert row.startswith("| decode rows=1 length=8 | 1.00 s (") and row.endswith("| 2.00 | 1.20 | 1.040 (± 0.040) |")


def test_a_table_of_many_adapters_says_what_a_ratio_is_to() -> None:
    timed, told = controlled(1.2, 1.04), dataclasses.replace(case(0.5), unit="bytes")
    table = scale_table(result(timed, told, command="ia3rt bench scale"))
    first, second = table.splitlines()[-2:]
    assert first.startswith("| decode rows=1 length=8 | 1.00 s (") and first.endswith(
        "| 1.20 × base | 1.040 (± 0.040) |"
    )
    assert second == "| decode rows=1 length=8 | 1 B | 2 B | 0 B | 0.5 × base |  |"


def test_a_result_without_controls_is_read(tmp_path) -> None:
    write_json(result(case(1.5)), tmp_path / "a.json")
    plain = json.loads((tmp_path / "a.json").read_text())
    plain["schema"] = 1
    for made in plain["cases"]:
        del made["control"]
        for measured in made["measurements"]:
            del measured["within_noise"]
    (tmp_path / "a.json").write_text(json.dumps(plain))
    assert read_json(tmp_path / "a.json").as_dict() == json.loads(json.dumps(result(case(1.5)).as_dict()))


def test_more_rounds_make_a_ratio_certain() -> None:
    """The error of a median, as it is in 4,000 runs that draw such samples."""
    draw = random.Random(0)

    def run(rounds: int) -> Measurement:
        return Measurement.of("ia3rt", [draw.gauss(1.0, 0.15) for _ in range(rounds)], [1.0] * rounds)

    assert run(5).is_noise and not run(200).is_noise
    medians = [run(101).ratio.p50 for _ in range(4000)]
    measured = statistics.median(run(101).error for _ in range(500))
    assert measured == pytest.approx(2 * statistics.pstdev(medians), rel=0.15)
