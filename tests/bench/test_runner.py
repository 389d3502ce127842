"""`ia3rt bench` on a tiny model: the suites, the contenders, what is timed and what is not, and the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from ia3rt.bench import cli as bench_cli
from ia3rt.bench.adapters import names
from ia3rt.bench.contenders import ia3rt as ours
from ia3rt.bench.contenders import peft as theirs
from ia3rt.bench.contenders import registered
from ia3rt.bench.contenders.registry import CONTENDERS, OURS
from ia3rt.bench.contenders.subject import LeftOut, Way
from ia3rt.bench.interleaved import Seconds
from ia3rt.bench.layers.case import BY_ROW, FUSED, PEFT, SEPARATE, UNADAPTED
from ia3rt.bench.models import SHAPES, build_model, clone, title_of
from ia3rt.bench.runner import drop_wrong, measure, run, run_case, warm_up
from ia3rt.bench.settings import Effort, Settings
from ia3rt.bench.suites.case import Case, Suite, Value, Ways, by_subject
from ia3rt.bench.suites.mixed import POPULARITY, worn
from ia3rt.bench.suites.registry import SUITES, cases_of
from ia3rt.bench.workshop import Workshop
from ia3rt.cli.main import app

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

CPU = torch.device("cpu")
ONCE = Effort(least=1, most=1, seconds=0, sample=0)
EAGER = [name for name in CONTENDERS if not name.endswith("-compiled")]
SETTINGS = Settings(list(SUITES), EAGER, model="tiny", quick=True, effort=ONCE)


@pytest.fixture(autouse=True)
def as_users_do(torch_backend: None) -> None:
    """Without Triton's interpreter."""


@pytest.fixture(scope="module")
def workshop():
    with Workshop(SETTINGS, CONTENDERS) as made:
        yield made


def quick_cases(suite: str) -> list[Case]:
    return list(SUITES[suite].cases(True))


@pytest.mark.parametrize("suite", [name for name in SUITES if name != "kernels"])
def test_each_suite_runs(suite: str, workshop: Workshop) -> None:
    for case in quick_cases(suite):
        result = run_case(suite, case, workshop)
        assert not result.failed
        measured = {measurement.contender: measurement for measurement in result.measurements}
        assert set(measured) | set(result.left_out) == set(EAGER)
        assert "adapterhub" in result.left_out  # no environment of its own was given
        is_ours_alone = case.parameters.get("adapters") == 1000 or "host's" in case.what
        assert measured.keys() >= ({"ia3rt"} if is_ours_alone else {"ia3rt", "peft"})
        assert result.reference in ("base", "peft") or is_ours_alone
        assert measured[result.reference].ratio is None
        for measurement in measured.values():
            assert measurement.taken.p50 > 0 or result.unit == "bytes"


def test_the_kernels_run_in_the_ways_of_the_layers(workshop: Workshop) -> None:
    case = next(case for case in quick_cases("kernels") if case.parameters["mode"] == "eager")
    result = run_case("kernels", case, workshop)
    assert not result.failed and result.reference == UNADAPTED and result.control is not None
    measured = {measurement.contender: measurement for measurement in result.measurements}
    assert set(measured) >= {FUSED, BY_ROW, UNADAPTED, SEPARATE, PEFT}
    for name, measurement in measured.items():
        assert 0 < measurement.taken.p20 <= measurement.taken.p50 <= measurement.taken.p80
        assert (measurement.ratio is None) == (name == UNADAPTED)


def test_the_kernels_are_left_out_without_a_gpu() -> None:
    result = run(dataclasses.replace(SETTINGS, suites=["kernels"]))
    assert not result.cases and "GPU" in result.not_run["kernels"]


def test_what_is_brought_in_is_in_the_tier_that_the_case_says(workshop: Workshop) -> None:
    """And each name has a folder of its own, though many have the same numbers."""
    subject = workshop.subject("ia3rt", 40, "scale", maker=registered.subject)
    assert len({workshop.adapters.own_folder(name).resolve() for name in names(40)}) == 40
    for way, tier in ((subject.from_host(), "host_loads"), (subject.from_disk(Path()), "disk_loads")):
        runtime = way.run.__closure__[0].cell_contents
        before = runtime.stats()
        for turn in range(50):
            way.run(turn)
        way.after()
        after = runtime.stats()
        assert getattr(after, tier) - getattr(before, tier) == 50 == after.misses - before.misses
    assert subject.resident_bytes() <= registered.BANK
    with pytest.raises(LeftOut, match="never evicted"):
        workshop.subject("ia3rt", 1, "scale", maker=registered.subject).from_host()


def test_every_suite_has_more_cases_than_its_quick_ones() -> None:
    for name, suite in SUITES.items():
        assert 0 < len(list(suite.cases(True))) <= len(list(suite.cases(False))), name
        for quick in (True, False):
            names = [case.name for case in suite.cases(quick)]
            assert len(set(names)) == len(names)
            assert all(suite.x in case.parameters for case in suite.cases(quick))


def test_the_cases_that_have_to_be_there() -> None:
    values = {
        name: {
            parameter: {case.parameters.get(parameter) for case in SUITES[name].cases(False)} for parameter in wanted
        }
        for name, wanted in {"mixed": ["rows"], "combine": ["mixed"], "scale": ["adapters"]}.items()
    }
    assert {1, 64} <= values["mixed"]["rows"] and {1, 16} <= values["combine"]["mixed"]
    assert {1, 10_000} <= values["scale"]["adapters"]
    assert {case.what for case in SUITES["mixed"].cases(False)} == set(POPULARITY)


def test_popularity() -> None:
    assert set(worn("identical", 64, 64)) == {"task0"}
    assert len(set(worn("distinct", 64, 64))) == 64
    uniform, zipf = worn("uniform", 64, 8), worn("zipf", 64, 8)
    assert zipf.count("task0") > uniform.count("task0") and len(set(uniform)) == 8


def test_contenders_share_the_weights_that_they_do_not_change(workshop: Workshop) -> None:
    base = {name: parameter.data_ptr() for name, parameter in workshop.model.named_parameters()}
    merged = dict(workshop.subject("merged", 2).model.named_parameters())
    own = {name for name in merged if merged[name].data_ptr() != base[name]}
    assert own == {f"{path}.weight" for path in workshop.adapters.paths}
    pointers = {parameter.data_ptr() for parameter in workshop.subject("peft", 2).model.parameters()}
    assert set(base.values()) <= pointers
    before = {name: parameter.clone() for name, parameter in workshop.model.named_parameters()}
    workshop.subject("merged", 2).wear(["task1"])
    assert all(torch.equal(parameter, before[name]) for name, parameter in workshop.model.named_parameters())


def test_the_merged_model_is_a_plain_one(workshop: Workshop) -> None:
    plain = {type(module) for module in clone(workshop.model).modules()}
    assert {type(module) for module in workshop.subject("merged", 2).model.modules()} == plain


def test_all_contenders_wear_the_same_adapter(workshop: Workshop) -> None:
    """But for the base model; and another adapter's result is further away than the tolerance."""
    ids = workshop.ids(2, 5)
    results = {name: workshop.subject(name, 2).prefill(ids, ["task1"]).result() for name in ("merged", "peft", "ia3rt")}
    other = workshop.subject("ia3rt", 2).prefill(ids, ["task0"]).result()
    made = Ways({name: Way(lambda _: None, lambda result=result: result) for name, result in results.items()})
    made.ways["other"] = Way(lambda _: None, lambda: other)
    drop_wrong(made, 5e-2)
    assert list(made.ways) == ["merged", "peft", "ia3rt"]
    assert "another result than merged's" in made.failed["other"]


def test_peft_serves_a_mixed_batch_row_by_row_and_right(workshop: Workshop) -> None:
    ids, names = workshop.ids(4, 5), ["task1", "task0", "task1", "task1"]
    mixed = workshop.subject("peft", 2).mixed(ids, names)
    assert "one after another" in mixed.note
    expected = torch.cat(
        [workshop.subject("peft", 2).prefill(ids[row : row + 1], [name]).result() for row, name in enumerate(names)]
    )
    torch.testing.assert_close(mixed.result(), expected, rtol=1e-4, atol=1e-5)


def test_a_step_in_the_cache_is_that_of_the_whole_prompt(workshop: Workshop) -> None:
    ids = workshop.ids(2, 6)
    way = workshop.subject("ia3rt", 2).decode(ids, ["task0"])
    whole = workshop.subject("ia3rt", 2).prefill(torch.cat([ids, ids[:, -1:]], dim=1), ["task0"]).result()
    for _ in range(2):  # the cache is the same each time
        torch.testing.assert_close(way.result(), whole, rtol=1e-4, atol=1e-5)


def test_a_wrong_result_is_not_timed(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    wear = ours.Ia3rt.wear
    monkeypatch.setattr(ours.Ia3rt, "wear", lambda self, names: wear(self, ["task1"]))
    result = run_case("forward", quick_cases("forward")[0], workshop)
    assert "another result than merged's" in result.failed["ia3rt"]
    assert "ia3rt" not in [measurement.contender for measurement in result.measurements]


def test_an_error_of_one_contender_is_named_and_the_others_run(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no\nluck")

    monkeypatch.setattr(theirs.Peft, "wear", fails)
    result = run_case("forward", quick_cases("forward")[0], workshop)
    assert result.failed == {"peft": "RuntimeError: no"}
    assert [m.contender for m in result.measurements] == ["base", "merged", "ia3rt"]


class FakeMachine:
    """Ways that take what a test says, on a clock that only they move."""

    def __init__(self) -> None:
        self.now = 0.0

    def way(self, seconds) -> Way:
        def run(turn: int) -> None:
            self.now += seconds(turn) if callable(seconds) else seconds

        return Way(run)

    def measure(self, ways: dict[str, object], effort: Effort, **options):
        made = {name: self.way(seconds) for name, seconds in ways.items()}
        return {m.contender: m for m in measure(made, "base", effort, CPU, clock=lambda: self.now, **options)}


def test_a_ratio_is_paired_within_its_round() -> None:
    """Both slow down by up to ten times, together: each alone is noise, the ratio is not."""
    busy = lambda turn: 1 + turn % 10  # noqa: E731
    effort = Effort(least=20, most=20, seconds=0, sample=0)
    measured = FakeMachine().measure({"base": busy, "ia3rt": lambda turn: 2 * busy(turn)}, effort)
    taken, ratio = measured["ia3rt"].taken, measured["ia3rt"].ratio
    assert taken.p80 > 2 * taken.p20
    assert (ratio.p20, ratio.p50, ratio.p80) == (2, 2, 2) and not measured["ia3rt"].is_noise
    assert measured["base"].ratio is None and not measured["base"].is_noise


def test_a_ratio_that_varies_too_much_is_noise() -> None:
    effort = Effort(least=20, most=20, seconds=0, sample=0)
    ways = {"base": 1.0, "steady": lambda turn: 2 + 0.01 * (turn % 5), "ia3rt": lambda turn: 2 + 0.2 * (turn % 5)}
    measured = FakeMachine().measure(ways, effort)
    assert measured["ia3rt"].is_noise and not measured["steady"].is_noise


def test_what_goes_on_beside_a_case_does_so_while_it_is_timed(workshop: Workshop) -> None:
    seen: list[str] = []

    @contextmanager
    def beside():
        seen.append("begins")
        yield
        seen.append("ends")

    def ways(*_: object) -> Ways:
        seen.append("made")
        return Ways({"base": Way(lambda _: seen.append("timed"), lambda: seen.append("compared") or torch.ones(1))})

    run_case("any", Case("any", {"n": 1}, ways, beside=beside), workshop)
    assert list(dict.fromkeys(seen)) == ["made", "compared", "begins", "timed", "ends"] and seen[-1] == "ends"


def test_short_runs_are_repeated_within_a_sample() -> None:
    measured = FakeMachine().measure({"base": 1e-4, "ia3rt": 1.0}, Effort(least=3, most=3, seconds=0, sample=0.01))
    assert (measured["base"].turns, measured["ia3rt"].turns) == (100, 1)
    assert measured["base"].taken.p50 == pytest.approx(1e-4)
    assert measured["ia3rt"].ratio.p50 == pytest.approx(1e4)


def test_what_comes_after_something_else_is_not_repeated_within_a_sample() -> None:
    machine, seen = FakeMachine(), list[str]()

    def run(_: int) -> None:
        seen.append("run")
        machine.now += 1e-4

    way = Way(run, before=lambda turns: seen.append(f"before {turns}"), repeats=False)
    effort = Effort(least=3, most=3, seconds=100, sample=0.01)
    (measured,) = measure({"base": way}, "base", effort, CPU, clock=lambda: machine.now)
    assert measured.turns == 1 and measured.taken.p50 == pytest.approx(1e-4)
    assert seen == ["before 1", "run"] * (len(seen) // 2)


def test_a_way_in_another_process_takes_its_time_itself() -> None:
    machine = FakeMachine()

    def run(_: int) -> Seconds:
        machine.now += 1.0  # what the message takes
        return Seconds(0.001)

    effort = Effort(least=3, most=3, seconds=100, sample=0.01)
    (measured,) = measure({"base": Way(run)}, "base", effort, CPU, clock=lambda: machine.now)
    assert measured.turns == 10 and measured.taken.p50 == pytest.approx(0.001)


def test_there_are_as_many_rounds_as_the_time_allows() -> None:
    effort = Effort(least=3, most=50, seconds=20, sample=0)
    assert len(FakeMachine().measure({"base": 1.0, "ia3rt": 1.0}, effort)["base"].samples) == 10
    assert len(FakeMachine().measure({"base": 100.0}, effort)["base"].samples) == 3
    assert len(FakeMachine().measure({"base": 1e-3}, effort)["base"].samples) == 50


def test_a_machine_that_becomes_slower_gets_fewer_rounds() -> None:
    effort = Effort(least=5, most=100, seconds=10, sample=0)
    slow = lambda turn: 1.0 if turn < 6 else 10.0  # noqa: E731
    assert len(FakeMachine().measure({"base": slow}, effort)["base"].samples) == 8
    stalls = lambda turn: 1.0 if turn < 2 else 100.0  # noqa: E731
    assert len(FakeMachine().measure({"base": stalls}, effort)["base"].samples) == 5
    assert len(FakeMachine().measure({"base": stalls}, effort, end=50.0)["base"].samples) == 3


def test_the_warm_up_goes_on_while_times_fall() -> None:
    times = iter([100.0, 10.0, 1.0, 1.0, 1.0])
    machine = FakeMachine()
    rounds = []

    def sample(turns: range) -> dict[str, list[float]]:
        rounds.append(turns)
        return {"base": [next(times)]}

    fastest, _ = warm_up(sample, lambda: machine.now)
    assert len(rounds) == 4 and fastest == {"base": 1.0}


def test_what_a_measurement_adds_is_gone_after_it(workshop: Workshop) -> None:
    for name in ("ia3rt", "peft"):
        subject = workshop.subject(name, 2)
        ways = {
            "base": subject.load(workshop.adapters.folder("task0")),
            "add": subject.add(workshop.adapters.vectors("task0")),
            "delete": subject.delete(workshop.adapters.vectors("task0")),
        }
        measure(ways, "base", Effort(least=2, most=2, seconds=0, sample=1e-9), CPU)
        kept = subject._runtime.adapters if name == "ia3rt" else list(subject.model.peft_config)
        assert kept == ["task0", "task1"]


def test_a_quick_run_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine()
    slow = [Case(f"case{i}", {"n": i}, lambda *_: Ways({"base": machine.way(0.5)})) for i in range(30)]
    monkeypatch.setitem(SUITES, "slow", Suite("slow", "", lambda _: iter(slow), "n"))
    effort = Effort(least=5, most=5, seconds=0, sample=0, deadline=20.0)
    result = run(dataclasses.replace(SETTINGS, suites=["slow"], effort=effort), clock=lambda: machine.now)
    assert machine.now < 25
    assert len(result.cases) + len(result.not_run) == 30 and 1 < len(result.cases) < 5
    assert set(result.not_run.values()) == {"the time of a quick run was up"}


def test_a_stopped_run_keeps_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> Ways:
        raise KeyboardInterrupt

    cases = [Case("value", {"n": 1}, lambda *_: Ways({"base": Value(1.0)})), Case("stop", {"n": 1}, stop)]
    monkeypatch.setitem(SUITES, "two", Suite("two", "", lambda _: iter(cases), "n"))
    result = run(dataclasses.replace(SETTINGS, suites=["two"]))
    assert [case.what for case in result.cases] == ["value"]
    assert result.not_run == {"two: stop n=1": "the run was stopped"}


@pytest.mark.parametrize("stopped", [0, 1])
def test_what_a_stopped_run_exits_with(stopped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what was measured keeps the budget."""

    def stop(*_: object) -> Ways:
        raise KeyboardInterrupt

    whole = Case("value", {"n": 1}, lambda *_: Ways({"peft": Value(1.0), "ia3rt": Value(1.0)}), references=("peft",))
    cases = [whole, Case("stop", {"n": 1}, stop)][1 - stopped :]
    monkeypatch.setitem(SUITES, "two", Suite("two", "", lambda _: iter(cases), "n"))
    rule = {"suite": "two", "case": "*", "contender": "ia3rt", "reference": "peft", "most": 2}
    (tmp_path / "budget.json").write_text(json.dumps({"rules": [rule]}))
    result = bench("two", "--model", "tiny", "--budget", tmp_path / "budget.json", "--out", tmp_path / "out")
    assert result.exit_code == 130, result.output
    assert len([*(tmp_path / "out").iterdir()]) == 3


def test_a_run_without_time_for_anything_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ia3rt.bench.settings.QUICK", dataclasses.replace(ONCE, deadline=-1.0))
    result = bench("memory", "--model", "tiny", "--quick", "--out", tmp_path)
    assert_one_line(result, 1, "nothing was measured")


def test_a_case_that_breaks_is_a_failure_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> Ways:
        raise MemoryError("no\nroom")

    cases = [Case("break", {"n": 1}, breaks), Case("value", {"n": 1}, lambda *_: Ways({"base": Value(1.0)}))]
    monkeypatch.setitem(SUITES, "two", Suite("two", "", lambda _: iter(cases), "n"))
    result = run(dataclasses.replace(SETTINGS, suites=["two"]))
    assert result.failures == ["two: break n=1: the case: MemoryError: no"]
    assert [case.what for case in result.cases] == ["break", "value"]
    assert bench_cli._ours_failed(result)


def test_compiling_without_a_compiler_is_left_out(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(LeftOut, match="no-such-compiler"):
        CONTENDERS["ia3rt-compiled"](workshop, ["task0"])


def test_left_out_is_no_failure(workshop: Workshop) -> None:
    def way(*_: object) -> Way:
        raise LeftOut("for a reason")

    made = by_subject(way, 1)(workshop, ["base"])
    assert made.left_out == {"base": "for a reason"} and not made.failed


def test_too_many_adapters_for_the_memory(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "free_memory", lambda _: 4 * 320 * 3)
    with pytest.raises(LeftOut, match="GB"):
        ours.build(workshop, ["task0", "task1"])
    with pytest.raises(LeftOut, match="up to 100"):
        theirs.build(workshop, [f"task{i}" for i in range(101)])


def test_a_model_that_is_cut_says_so() -> None:
    assert title_of(SETTINGS) == "tiny, random weights"
    assert "4 layers only, vocabulary 4,096" in title_of(dataclasses.replace(SETTINGS, model="llama-3-8b"))
    assert "3 layers only" in title_of(dataclasses.replace(SETTINGS, model="smollm2-135m", layers=3))


def test_the_shapes_are_the_real_models() -> None:
    """Parameters as the model cards say: 134.5 M and 1.24 B."""
    with torch.device("meta"):
        for name, parameters in {"smollm2-135m": 134_515_008, "llama-3.2-1b": 1_235_814_400}.items():
            model = build_model(dataclasses.replace(SETTINGS, model=name, device=torch.device("meta")))
            assert model.num_parameters() == parameters, name
    assert SHAPES["llama-3-8b"].kv_width == 1024


@pytest.mark.slow
def test_compiled_contenders(tmp_path: Path) -> None:
    contenders = ["base", "base-compiled", "peft-compiled", "ia3rt-compiled"]
    result = run(dataclasses.replace(SETTINGS, suites=["forward", "switch"], contenders=contenders))
    assert not result.failures
    for case in result.cases[:2]:
        assert [measurement.contender for measurement in case.measurements] == contenders


def test_adapterhub_without_its_package_is_named(workshop: Workshop) -> None:
    settings = dataclasses.replace(SETTINGS, adapterhub_python=Path(sys.executable), contenders=["adapterhub"])
    with Workshop(settings, CONTENDERS) as own:
        result = run_case("forward", quick_cases("forward")[0], own)
    assert "does its environment hold the packages adapters and torch?" in result.failed["adapterhub"]


# The command line.


def bench(*arguments: str | Path) -> Result:
    wide = {"COLUMNS": "300", "TERMINAL_WIDTH": "300"}
    return CliRunner(env=wide).invoke(app, ["bench", *(str(argument) for argument in arguments)])


def assert_one_line(result: Result, code: int, *parts: str) -> None:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output and isinstance(result.exception, SystemExit)
    lines = [line for line in result.output.splitlines() if all(part in line for part in parts)]
    assert len(lines) == 1, result.output


def test_the_command_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ia3rt.bench.settings.QUICK", ONCE)
    result = bench("forward", "memory", "--model", "tiny", "--against", "ia3rt,base,peft", "--quick", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "prefill rows=1 length=16" in result.output and "ia3rt" in result.output
    by_ending = {file.suffix: file for file in tmp_path.iterdir()}
    assert set(by_ending) == {".json", ".csv", ".html"}
    plain = json.loads(by_ending[".json"].read_text())
    assert plain["schema"] == 2 and plain["contenders"] == ["base", "peft", "ia3rt"]
    assert {case["suite"] for case in plain["cases"]} == {"forward", "memory"}
    assert {"processor", "cores", "memory_bytes", "devices", "torch_threads"} <= set(plain["machine"])
    assert {"python", "torch", "transformers", "peft", "ia3rt", "triton"} <= set(plain["versions"])
    for case in plain["cases"]:
        for measurement in case["measurements"]:
            assert all(math.isfinite(measurement["taken"][p]) for p in ("p20", "p50", "p80"))
    assert bench("compare", by_ending[".json"], by_ending[".json"]).exit_code == 0
    assert bench("compare", tmp_path, by_ending[".json"]).exit_code == 1


def test_cases_by_name() -> None:
    wanted = dataclasses.replace(SETTINGS, suites=["switch", "forward"], cases="*e rows=?*")
    assert [(suite, case.name) for suite, case in cases_of(wanted)] == [("forward", "decode rows=1 length=16")]


# What is said to do instead of a CUDA graph on the CPU.
INSTEAD = "give --device cuda" if torch.cuda.is_available() else "leave --graph out"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["backward"], ["SUITE", "'backward'", "forward"]),
        (["--against", "base,lora"], ["--against", "'lora'", "adapterhub"]),
        (["--against", ","], ["--against", "names none"]),
        (["--model", "/nowhere/at/all", "memory"], ["--model", "'/nowhere/at/all' is not there: give the folder"]),
        (["--model", "nowhere/at/all", "memory"], ["--model", "'nowhere/at/all', which is no folder", "smollm2-135m"]),
        (["--model", "/nowhere", "--layers", "2"], ["--layers", "built-in shape"]),
        (["--layers", "0"], ["--layers", "at least one"]),
        (["--device", "abacus"], ["--device", "'abacus'"]),
        (["--dtype", "float8"], ["--dtype", "'float8'", "bfloat16"]),
        (["--adapterhub-python", "/nowhere/python"], ["--adapterhub-python", "/nowhere/python"]),
        (["kernels", "--device", "cpu"], ["SUITE", "GPU"]),
        (["forward", "--graph", "--device", "cpu"], ["--graph", "need a CUDA GPU", "this run is on cpu", INSTEAD]),
        (["forward", "--cases", "decode 1*"], ["--cases", "'decode 1*'", "'decode rows=1 length=128'"]),
    ],
)
def test_useless_options(arguments: list[str], parts: list[str], tmp_path: Path) -> None:
    assert_one_line(bench(*arguments, "--out", tmp_path / "out"), 2, *parts)


def test_a_useless_budget(tmp_path: Path) -> None:
    (tmp_path / "budget.json").write_text("{}")
    assert_one_line(bench("--budget", tmp_path / "budget.json"), 1, "Error:", "is not a budget")
    assert_one_line(bench("--budget", tmp_path / "none.json"), 1, "Error:", "none.json")


def test_help_is_quick_and_names_everything() -> None:
    output = bench("--help").output
    for name in [*SUITES, *CONTENDERS, "compare", "--budget", "--graph"]:
        assert name in output
    assert OURS[0] in output
