"""Builds every shipped launch for one architecture.

A case's second kernel, if its launcher launches two, is filed under the case's name and its own. On sm_90 each case
that has to use wgmma is built without any scale too, under its name and PLAIN.
"""

from __future__ import annotations

from functools import partial

from ia3rt.bench.compiled.case import Case
from ia3rt.bench.compiled.driver import Builder
from ia3rt.bench.compiled.facts import Facts, facts_of

PLAIN = ", no scale"


def all_cases() -> dict[str, Case]:
    """Return every case, by its name. Imports the kernels."""
    from ia3rt.bench.compiled import activation, attention, gate_up, linear, quantised, rope

    cases: dict[str, Case] = {}
    for operation in (linear, activation, gate_up, rope, attention, quantised):
        cases |= operation.CASES
    return cases


def build_all(arch: str, part: str = "") -> dict[str, Facts]:
    """Build the cases that have `part` in their name for one architecture."""
    builder = Builder(arch)
    facts: dict[str, Facts] = {}
    for name, case in all_cases().items():
        if part not in name:
            continue
        compares = arch == "sm_90" and case.wgmma
        for title, has_scale in ((name, True), (name + PLAIN, False)) if compares else ((name, True),):
            for index, kernel in enumerate(builder.build(partial(case.launch, has_scale))):
                facts[f"{title}, {kernel.metadata.name}" if index else title] = facts_of(arch, kernel)
    return facts
