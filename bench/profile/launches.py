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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ia3rt.bench.contenders.ia3rt import Ia3rt, build
from ia3rt.bench.contenders.subject import Way
from ia3rt.bench.profile.counted import Counts, Wearing, count, count_layers
from ia3rt.bench.workshop import Workshop

WEARINGS = (Wearing("ia3rt", 1), Wearing("ia3rt", 16), Wearing("ia3rt", by_row=True))


def launches() -> dict[str, int]:
    """Of a decoding step on the Triton backend: by what is worn, how many kernels a layer launches."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ia3rt.bench.profile.launches"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _count(way: Way) -> Counts:
    """As `count`, but of ia3rt's operations it is the launches that count."""
    launched: Counter[str] = Counter()
    with _launches_into(launched):
        counts: Counts = count(way)
    for name in [name for name in counts.operations if name.startswith("ia3rt::")]:
        del counts.operations[name]
    counts.operations.update({name: times // 3 for name, times in launched.items()})  # `count` runs the way three times
    return counts


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


def _on_triton(workshop: Workshop, names: Sequence[str]) -> Ia3rt:
    return Ia3rt(*build(workshop, names, backend="triton"))


if __name__ == "__main__":
    found = count_layers(WEARINGS, {"ia3rt": _on_triton}, _count)
    print(json.dumps({str(wearing): counts.operations.total() for wearing, counts in found.items()}))
