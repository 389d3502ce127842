"""What a run of the benchmarks was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        least: rounds of a case at least, unless the deadline passes meanwhile.
        most: rounds of a case at most.
        seconds: what a case's rounds should take together; at twice as many no further one begins.
        sample: the least seconds of one measurement; what is shorter is repeated within it.
        deadline: seconds after which the run begins no other case, and names those that are left; None for no end.
    """

    least: int
    most: int
    seconds: float
    sample: float
    deadline: float | None = None


QUICK = Effort(least=5, most=25, seconds=2.0, sample=0.02, deadline=95.0)
FULL = Effort(least=15, most=100, seconds=20.0, sample=0.05)


@dataclass(frozen=True)
class Settings:
    """The options of `ia3rt bench`, checked.

    Attributes:
        suites: the suites' names, in the order they run.
        contenders: what is compared.
        cases: a pattern of the cases' names, as for file names.
        model: a built-in shape, a folder, or a Hugging Face id.
        layers: how many layers of a built-in shape; None for its own number.
        device: where to compute.
        dtype: the weights' type.
        quick: whether to run the few cases that end in two minutes on two cores.
        graph: whether forwards are timed in CUDA graphs too.
        effort: how long to measure.
        adapterhub_python: the Python of AdapterHub's own environment, where there is one.
    """

    suites: Sequence[str]
    contenders: Sequence[str]
    cases: str = "*"
    model: str = "smollm2-135m"
    layers: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    quick: bool = False
    graph: bool = False
    effort: Effort = FULL
    adapterhub_python: Path | None = None
