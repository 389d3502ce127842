"""All suites, by name; in the order in which they run, so that a quick run whose time is up has seen most."""

from __future__ import annotations

from collections.abc import Iterator

from ia3rt.bench.options import matching
from ia3rt.bench.settings import Settings
from ia3rt.bench.suites import combine, document, forward, generate, kernels, load, memory, mixed, scale, switch, train
from ia3rt.bench.suites.case import Case, Suite

_MODULES = (forward, generate, switch, mixed, combine, load, train, memory, document, scale, kernels)
SUITES: dict[str, Suite] = {module.SUITE.name: module.SUITE for module in _MODULES}


def cases_of(settings: Settings) -> list[tuple[str, Case]]:
    """The cases that the settings ask for and that their device can run, with their suites' names.

    Raises:
        UsageError: none has such a name.
    """
    runnable = [name for name in settings.suites if SUITES[name].wants(settings.device) is None]
    cases = [(name, case) for name in runnable for case in _cases_of(SUITES[name], settings)]
    chosen: list[tuple[str, Case]] = matching(settings.cases, cases, lambda named: named[1].name)
    return chosen


def _cases_of(suite: Suite, settings: Settings) -> Iterator[Case]:
    for case in suite.cases(settings.quick):
        yield case
        if settings.graph and suite.in_graph is not None:
            yield suite.in_graph(case)
