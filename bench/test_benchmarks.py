"""The cases of `ia3rt bench` as pytest-benchmark's: `python -m pytest bench --dist no --model tiny -k mixed`.

One contender at a time, so without ratios: for a developer who changes one thing, and wants its time again. Without
`--dist no` pytest-xdist switches the timing off.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ia3rt.bench.contenders.registry import CONTENDERS
from ia3rt.bench.contenders.subject import Way
from ia3rt.bench.settings import QUICK, Settings
from ia3rt.bench.suites.case import Case
from ia3rt.bench.suites.registry import SUITES
from ia3rt.bench.workshop import Workshop

CASES = [
    pytest.param(case, name, id=f"{suite.name}: {case.name}, {name}")
    for suite in SUITES.values()
    if suite.name != "kernels"  # whose ways are not the contenders': `ia3rt bench kernels`
    for case in suite.cases(True)
    if case.unit != "bytes"
    for name in CONTENDERS
    if not name.endswith("-compiled")
]


@pytest.fixture(scope="session")
def workshop(request: pytest.FixtureRequest) -> Iterator[Workshop]:
    """The model of --model."""
    settings = Settings(
        list(SUITES), list(CONTENDERS), model=request.config.getoption("--model"), quick=True, effort=QUICK
    )
    with Workshop(settings, CONTENDERS) as made:
        yield made


@pytest.mark.parametrize(("case", "contender"), CASES)
def test_case(case: Case, contender: str, workshop: Workshop, benchmark: Any) -> None:
    """Times one contender in one case."""
    made = case.ways(workshop, [contender])
    assert not made.failed, made.failed
    if contender in made.left_out:
        pytest.skip(made.left_out[contender])
    way = made.ways[contender]
    assert isinstance(way, Way)

    def clean_up() -> None:
        if way.after is not None:
            way.after()

    def prepare() -> None:
        clean_up()
        if way.before is not None:
            way.before(1)

    benchmark.group = case.name
    with case.beside():
        benchmark.pedantic(way.run, args=(0,), setup=prepare, rounds=QUICK.least, warmup_rounds=1)
    clean_up()
