"""All suites, by name; in the order in which they run, so that a quick run whose time is up has seen most."""

from __future__ import annotations

from ia3rt.bench.suites import combine, forward, generate, kernels, load, memory, mixed, scale, switch, train
from ia3rt.bench.suites.case import Suite

_MODULES = (forward, generate, switch, mixed, combine, load, train, memory, scale, kernels)
SUITES: dict[str, Suite] = {module.SUITE.name: module.SUITE for module in _MODULES}
