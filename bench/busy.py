"""Other processes that keep the cores busy, as a server's other work does, while something is measured."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# It ends by itself when its parent is gone, which may have been killed before it could end it.
_WORK = """
import os, sys
print("at work", flush=True)
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def busy_cores() -> Iterator[list[int]]:
    """A context in which a process for each core of this one computes; gives their ids. They end with it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ExitStack() as workers:
        started = [workers.enter_context(_worker()) for _ in range(cores)]
        for worker in started:
            assert worker.stdout is not None
            worker.stdout.readline()
        yield [worker.pid for worker in started]


@contextmanager
def _worker() -> Iterator[subprocess.Popen[bytes]]:
    worker = subprocess.Popen(
        [sys.executable, "-c", _WORK, str(os.getpid())], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        yield worker
    finally:
        worker.kill()
        worker.communicate()
