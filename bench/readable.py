"""Numbers as people read them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ia3rt.bench.result import CaseResult, Measurement

NOISY = "noise"
WITHIN = "within noise"
CONTROL_IS = (
    "control: the reference, timed a second time. In brackets: how far its ratio is from 1, or may be by chance. A "
    "ratio no further from 1 than that, or than chance may have moved it, is within noise: neither a win nor a loss."
)


def seconds(value: float) -> str:
    """A time with three digits, in the unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size or unit == "µs":
            return f"{_three(value / size)} {unit}"
    raise AssertionError


def size(value: float) -> str:
    """Bytes with three digits, in the unit that fits."""
    for unit, of in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= of:
            return f"{_three(value / of)} {unit}"
    return f"{value:.0f} B"


def taken(case: CaseResult, value: float) -> str:
    """What a case's contender took."""
    return size(value) if case.unit == "bytes" else seconds(value)


def rate(case: CaseResult, measured: Measurement) -> str:
    """Units a second; empty where that says nothing."""
    value = case.rate(measured)
    return "" if value is None else f"{_three(value)} {case.unit}/s"


def ratio(case: CaseResult, measured: Measurement) -> str:
    """The ratio to the reference, or why it is not shown."""
    if measured.contender == case.reference:
        return "reference"
    if measured.ratio is None:
        return ""
    if measured.is_noise:
        return NOISY
    return WITHIN if case.is_within_noise(measured) else f"{of_one(measured.ratio.p50)} ×"


def cell(measured: Measurement, control: Measurement | None) -> str:
    """The ratio as a document's tables have it: ° marks one that is within noise."""
    if measured.ratio is None:
        return ""
    shown = of_one(measured.ratio.p50)
    return NOISY if measured.is_noise else f"{shown} °" if measured.is_within(control) else shown


def control(measured: Measurement) -> str:
    """The control's ratio, and how far from 1 another ratio must be to be called one."""
    assert measured.ratio is not None
    return f"{of_one(measured.ratio.p50)} × (± {measured.doubt:.3f})"


def of_one(value: float) -> str:
    """A ratio: near 1 its thousandths count."""
    return f"{value:.3f}" if 0.9 < value < 1.1 else _three(value)


def noise_reason(measured: Measurement) -> str:
    """Why a ratio is not shown."""
    assert measured.ratio is not None
    return (
        f"the ratio is {_three(measured.ratio.p20)} … {_three(measured.ratio.p80)} × (p20 … p80), its median may be "
        f"off by {measured.error / measured.ratio.p50:.0%}"
    )


def _three(value: float) -> str:
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.995 else f"{value:.3g}"


def command(line: str) -> str:
    """A command without the folder that its files went to, which is for a reader to say."""
    return re.sub(r" --out \S+", "", line)


def packages(versions: Mapping[str, str | None]) -> str:
    """The packages that were there, with their versions, in a line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version and name != "numpy")
