"""Kernels that a layer launches, by construction: torch's operations that compute, and ia3rt's own launches.

Run as `python -m ia3rt.bench.profile.launches` in a process of its own: the Triton backend runs in Triton's
interpreter, which is chosen before a kernel is imported. It computes slowly, and launches what it would on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import ia3rt
from ia3rt.bench.adapters import AdapterSet, names
from ia3rt.bench.contenders.ia3rt import Ia3rt
from ia3rt.bench.models import build_model, clone
from ia3rt.bench.profile.counted import ROWS, Counts, Wearing, count
from ia3rt.bench.settings import Settings

WEARINGS = (Wearing("ia3rt", 1), Wearing("ia3rt", 16), Wearing("ia3rt", by_row=True))


def launches() -> dict[str, dict[str, int]]:
    """Of a decoding step on the Triton backend: by what is worn, how often a layer launches which kernel."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ia3rt.bench.profile.launches"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _count(layers: int) -> dict[Wearing, Counts]:
    model = build_model(Settings([], [], model="smollm2-135m", layers=layers, dtype=torch.float32))
    patched = clone(model)
    runtime = ia3rt.patch(patched, capacity=ROWS, backend="triton")
    with TemporaryDirectory() as folder:
        adapters = AdapterSet(model, Path(folder))
        for name in names(ROWS):
            runtime.add_adapter(name, adapters.vectors(name))
    subject = Ia3rt(patched, runtime)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 1000, (ROWS, 4), generator=generator)
    found = {}
    for wearing in WEARINGS:
        if wearing.by_row:
            way = subject.mixed(ids[:, :1], names(ROWS))
        else:
            way = subject.decode(ids[:1], names(wearing.mixed))
        launched: Counter[str] = Counter()
        with _launches_into(launched):
            counts = count(way)
        ours = {name: launched[name] // 3 for name in launched}  # `count` runs the way three times
        for name in [name for name in counts.operations if name.startswith("ia3rt::")]:
            del counts.operations[name]  # it is its launches that count
        counts.operations.update(ours)
        found[wearing] = counts
    return found


@contextmanager
def _launches_into(launched: Counter[str]) -> Iterator[None]:
    from triton.runtime import interpreter

    original = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        launched["ia3rt." + self.fn.__name__] += 1
        original(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = call
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__ = original


def main() -> None:
    """Print the counts of a layer as JSON."""
    shallow, deep = _count(1), _count(2)
    counts = {str(wearing): dict(deep[wearing].less(shallow[wearing]).operations) for wearing in WEARINGS}
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
