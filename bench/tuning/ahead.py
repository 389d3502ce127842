"""Builds the candidates' kernels in many processes, into Triton's cache on the disk, where the measuring finds them.

A worker launches as measuring does, on tensors without data, with a driver that stops before the launch
(bench/compiled/driver.py). What a kernel is built for it knows from the architecture's name; so it touches no GPU, and
the process that measures has that for itself. The key in the cache is the same: source, arguments, options and target.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

Task = tuple[str, Any, Any]
"""An operation's name, a shape, and a config."""

_builder: Any = None


def tasks(shapes: Iterable[tuple[str, Any]], arch: str, processors: int) -> list[Task]:
    """Return what there is to build: of launches that share their code, the first one."""
    from ia3rt.bench.tuning.registry import OPERATIONS

    found: dict[object, Task] = {}
    for name, shape in shapes:
        for config in OPERATIONS[name].candidates(shape, arch, processors):
            if config is not None:
                found.setdefault(_code(name, shape, config), (name, shape, config))
    return list(found.values())


def _code(name: str, shape: Any, config: Any) -> object:
    """Return what differs where the code does: sizes matter by their factor of 16, and rows not at all."""
    sizes = {key: value % 16 for key, value in shape._asdict().items() if key in ("N", "K")}
    rest = shape._asdict() | {"rows": 0, "heads": 0} | sizes
    options = dict(vars(config))
    if "splits" in options:
        options |= {"splits": config.splits > 1, "resident": config.resident > 0}
    return name, tuple(rest.items()), tuple(options.items())


def build(work: list[Task], arch: str, processors: int, workers: int | None = None) -> Iterator[str | None]:
    """Yield for each task, when it is done, None, or what was wrong: that config is left to the measuring, too."""
    context = multiprocessing.get_context("spawn")  # a fork would take the parent's CUDA with it
    with ProcessPoolExecutor(
        workers or os.cpu_count(), context, initializer=_start, initargs=(arch, processors)
    ) as pool:
        for done in as_completed([pool.submit(_build, *task) for task in work]):
            yield done.result()


def _start(arch: str, processors: int) -> None:
    """Prepare a worker."""
    from ia3rt.bench.compiled.driver import Builder

    global _builder
    _builder = Builder(arch, processors)


def _build(name: str, shape: Any, config: Any) -> str | None:
    import torch

    from ia3rt.bench.layers.case import Inputs
    from ia3rt.bench.tuning.registry import OPERATIONS

    run = OPERATIONS[name].runner(shape, Inputs(torch.device("meta"), getattr(torch, shape.dtype)))
    try:
        _builder.build(lambda: run(config, 0))
    except Exception as error:
        return f"{name}, {shape}, {config}: {type(error).__name__}: {error}"
    return None
