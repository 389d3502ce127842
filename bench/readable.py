"""Numbers as people read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ia3rt.bench.result import CaseResult, Measurement

COLUMNS = ("case", "contender", "p20", "p50", "p80", "rate", "ratio", "rounds")
NOISY = "noise"
WITHIN = "within noise"
CONTROL_IS = (
    "control: the reference, timed a second time. In brackets: how far its ratio is from 1, or may be by chance. A "
    "ratio no further from 1 than that, or than chance may have moved it, is within noise: neither a win nor a loss."
)


def row(case: CaseResult, measured: Measurement) -> dict[str, str]:
    """What is told of a contender, or of the control, in a case, by column."""
    first, is_control = measured is case.all_measured[0], measured is case.control
    show = size if case.unit == "bytes" else seconds
    return {
        "case": case.name if first else "",
        "contender": measured.contender,
        **{percentile: show(getattr(measured.taken, percentile)) for percentile in ("p20", "p50", "p80")},
        "rate": "" if is_control or case.work is None else f"{_three(case.rate(measured))} {case.unit}/s",
        "ratio": control(measured) if is_control else ratio(case, measured),
        "rounds": f"{len(measured.samples)} × {measured.turns}",
    }


def seconds(value: float) -> str:
    """A time with three digits, in the unit that fits."""
    for unit, of in (("s", 1.0), ("ms", 1e-3)):
        if value >= of:
            return f"{_three(value / of)} {unit}"
    return f"{_three(value / 1e-6)} µs"


def size(value: float) -> str:
    """Bytes with three digits, in the unit that fits."""
    for unit, of in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= of:
            return f"{_three(value / of)} {unit}"
    return f"{value:.0f} B"


def ratio(case: CaseResult, measured: Measurement) -> str:
    """The ratio to the reference, or why it is not shown."""
    if measured.contender == case.reference:
        return "reference"
    if measured.ratio is None:
        return ""
    if measured.is_noise:
        return NOISY
    return WITHIN if measured.is_within(case.control) else f"{_of_one(measured.ratio.p50)} ×"


def cell(measured: Measurement, control: Measurement | None) -> str:
    """The ratio as a document's tables have it: ° marks one that is within noise."""
    if measured.ratio is None:
        return ""
    shown = _of_one(measured.ratio.p50)
    return NOISY if measured.is_noise else f"{shown} °" if measured.is_within(control) else shown


def control(measured: Measurement | None) -> str:
    """The control's ratio, and how far from 1 another ratio must be to be called one."""
    if measured is None or measured.ratio is None:
        return ""
    return f"{_of_one(measured.ratio.p50)} (± {measured.doubt:.3f})"


def noise_reason(measured: Measurement) -> str:
    """Why a ratio is not shown."""
    assert measured.ratio is not None
    return (
        f"the ratio is {_three(measured.ratio.p20)} … {_three(measured.ratio.p80)} × (p20 … p80), its median may be "
        f"off by {measured.error / measured.ratio.p50:.0%}"
    )


def ran(command: str, on: Mapping[str, Any], versions: Mapping[str, str | None]) -> str:
    """What was run, if that is said, and in a line below it on which machine, with which packages."""
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version and name != "numpy")
    where = f"{on['processor']}, {on['cores']} cores, {on['torch_threads']} threads; {packages}."
    shown = re.sub(r" --out [^\s`]+", "", command)  # where its files went is for a reader to say
    return f"{shown}\\\n{where}" if command else where


def _of_one(value: float) -> str:
    """A ratio: near 1 its thousandths count."""
    return f"{value:.3f}" if 0.9 < value < 1.1 else _three(value)


def _three(value: float) -> str:
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.995 else f"{value:.3g}"
