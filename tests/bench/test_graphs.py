"""`ia3rt bench --graph`: which cases it adds, and what is captured of a way.

CUDA's graphs are played by what notes a forward's operations, and does them again on the same tensors: like a graph it
knows nothing of Python, and sees what tensors hold when it is replayed.
"""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ia3rt.bench.contenders.registry import CONTENDERS
from ia3rt.bench.contenders.subject import LeftOut, Subject, Way
from ia3rt.bench.runner import run_case
from ia3rt.bench.settings import Effort, Settings
from ia3rt.bench.suites.case import Case, Value
from ia3rt.bench.suites.graphs import captured_way, in_graph
from ia3rt.bench.suites.registry import SUITES, cases_of
from ia3rt.bench.workshop import Workshop

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

EAGER = [name for name in CONTENDERS if not name.endswith("-compiled")]
ONCE = Effort(least=1, most=1, seconds=0, sample=0)
SETTINGS = Settings(["forward", "mixed", "generate"], EAGER, model="tiny", quick=True, graph=True, effort=ONCE)


class PlayedGraph(TorchDispatchMode):
    """Operations, done again at `replay`."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple] = []
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.noted.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        self.replays += 1
        with torch.inference_mode():
            for func, args, kwargs, result in self.noted:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # no view, and not in place
                        old.copy_(new)


class Stream:
    def wait_stream(self, _: object) -> None:
        return


@pytest.fixture(autouse=True)
def graphs(torch_backend: None, monkeypatch: pytest.MonkeyPatch) -> list[PlayedGraph]:
    """What is captured meanwhile."""
    made: list[PlayedGraph] = []

    def new_graph() -> PlayedGraph:
        made.append(PlayedGraph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    return made


@pytest.fixture(scope="module")
def workshop():
    with Workshop(SETTINGS, CONTENDERS) as made:
        yield made


def quick(suite: str) -> Case:
    return next(iter(SUITES[suite].cases(True)))


def test_each_case_is_followed_by_its_captured_one() -> None:
    names = [(suite, case.name) for suite, case in cases_of(SETTINGS)]
    eager = [(suite, case.name) for suite, case in cases_of(dataclasses.replace(SETTINGS, graph=False))]
    assert names[::2] == eager  # so that they compare with those of earlier runs
    endings = {"forward": " mode=graph", "mixed": " mode=graph", "generate": " cache=static"}
    assert names[1::2] == [(suite, name + endings[suite]) for suite, name in eager]


def test_other_suites_have_nothing_to_capture() -> None:
    for name in set(SUITES) - set(SETTINGS.suites):
        one = dataclasses.replace(SETTINGS, suites=[name], device=torch.device("cuda"))
        assert [case.name for _, case in cases_of(one)] == [case.name for case in SUITES[name].cases(True)]


@pytest.mark.parametrize("suite", ["forward", "mixed"])
def test_the_contenders_of_a_captured_case(suite: str, workshop: Workshop, graphs: list[PlayedGraph]) -> None:
    for eager in SUITES[suite].cases(True):
        graphs.clear()
        result = run_case(suite, in_graph(eager), workshop)
        assert not result.failed and result.parameters["mode"] == "graph" and result.reference == "base"
        measured = {measurement.contender: measurement for measurement in result.measurements}
        assert set(measured) >= {"base", "peft", "ia3rt"} and set(measured) | set(result.left_out) == set(EAGER)
        assert measured["base"].ratio is None and measured["ia3rt"].ratio is not None and result.control is not None
        assert len(graphs) == len(measured) + 1  # the control is a second model, captured too
        assert all(graph.replays > 1 for graph in graphs)
        assert bool(measured["peft"].note) == (suite == "mixed")  # what a reader has to know is still said


@pytest.mark.parametrize("contender", ["base", "merged", "peft", "ia3rt"])
@pytest.mark.parametrize("what", ["prefill", "decode"])
def test_a_replay_runs_no_python_of_the_model(
    what: str, contender: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = workshop.subject(contender, 4)
    eager = getattr(subject, what)(workshop.ids(2, 6), ["task1"])
    truth = eager.run(0).clone()
    way = captured_way(eager, 1e-4)
    monkeypatch.setattr(type(subject.model), "__call__", None)
    torch.testing.assert_close(way.run(3), truth, rtol=1e-4, atol=1e-5)
    assert (way.result is None) == (contender == "base")


def test_what_rows_wear_is_said_before_each_replay(workshop: Workshop) -> None:
    """By writing what the captured operations read, which is all that a graph sees of it."""
    subject = workshop.subject("ia3rt", 4)
    ids, names = workshop.ids(4, 5), ["task1", "task0", "task3", "task1"]
    eager = subject.mixed(ids, names)
    way = captured_way(eager, 1e-4)
    truth = eager.run(0).clone()
    subject._runtime.route(["task2"] * 4)
    other = subject._logits(ids).clone()
    assert not torch.allclose(other, truth, rtol=1e-2)
    torch.testing.assert_close(way.run(0), truth, rtol=1e-4, atol=1e-5)


def test_what_does_not_compute_here_is_left_out() -> None:
    for way in (Way(lambda _: None), Value(1.0)):
        with pytest.raises(LeftOut, match="this process"):
            captured_way(way, 1e-4)


def test_a_graph_with_another_result_is_not_timed(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def replay(graph: PlayedGraph) -> None:
        with torch.inference_mode():
            graph.noted[-1][-1].zero_()

    monkeypatch.setattr(PlayedGraph, "replay", replay)
    result = run_case("forward", in_graph(quick("forward")), workshop)
    assert not result.measurements and set(result.failed) == {"base", "merged", "peft", "ia3rt"}
    assert "another result in a CUDA graph" in result.failed["ia3rt"]


def test_what_cannot_be_captured_is_named_and_the_others_run(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = Subject._logits

    def fails(self: Subject, ids: Tensor) -> Tensor:
        if self is workshop.subject("peft", 4) and torch.utils._python_dispatch._get_current_dispatch_mode_stack():
            raise RuntimeError("operation not permitted when stream is capturing")
        return logits(self, ids)

    monkeypatch.setattr(Subject, "_logits", fails)
    result = run_case("forward", in_graph(quick("forward")), workshop)
    assert result.failed == {"peft": "RuntimeError: operation not permitted when stream is capturing"}
    assert [measurement.contender for measurement in result.measurements] == ["base", "merged", "ia3rt"]


def test_generation_with_a_static_cache(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compared by the step that `decode` does, whose cache grows."""
    case = SUITES["generate"].in_graph(quick("generate"))
    result = run_case("generate", case, workshop)
    assert not result.failed and {"base", "peft", "ia3rt"} <= {measured.contender for measured in result.measurements}
    subject, ids = workshop.subject("ia3rt", 4), workshop.ids(2, 6)
    asked: list[dict] = []
    generate = subject.model.generate
    monkeypatch.setattr(subject.model, "generate", lambda **options: asked.append(options) or generate(**options))
    way = subject.generate(ids, ["task1"], 4, static=True)
    step = subject.decode(ids, ["task1"]).run(0)
    torch.testing.assert_close(way.result(), step[:, -1], rtol=1e-4, atol=1e-5)
    way.run(0)
    assert len(asked) == 2 and all(options["cache_implementation"] == "static" for options in asked)


@pytest.mark.parametrize("contender", ["base-compiled", "peft-compiled", "ia3rt-compiled"])
def test_compiled_contenders_leave_a_static_cache_to_transformers(contender: str, workshop: Workshop) -> None:
    subject = CONTENDERS[contender](workshop, ["task0"])
    with pytest.raises(LeftOut, match="transformers compiles"):
        subject.generate(workshop.ids(1, 4), ["task0"], 2, static=True)
