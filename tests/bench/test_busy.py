"""What keeps the cores busy while something is measured: it is there meanwhile, and never afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ia3rt.bench.busy import busy_cores

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's /proc")


def computes(process: int) -> bool:
    """Whether the process is there, and is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "RS"
    except OSError:
        return False


def worked(process: int) -> int:
    """The processor's time that it has used, in ticks."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11])


def test_a_process_for_each_core_computes_meanwhile() -> None:
    with busy_cores() as processes:
        assert len(processes) == len(os.sched_getaffinity(0))
        before = [worked(process) for process in processes]
        end = time.monotonic() + 30
        while any(worked(process) == ticks for process, ticks in zip(processes, before, strict=True)):
            assert time.monotonic() < end, "they do nothing"
            time.sleep(0.02)
    assert not any(map(computes, processes))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_they_end_when_the_measurement_does_not(error: type[BaseException]) -> None:
    with pytest.raises(error), busy_cores() as processes:
        raise error
    assert not any(map(computes, processes))


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_they_end_with_a_measuring_process(ending: signal.Signals) -> None:
    """Ctrl-C, and what leaves it no time to end them."""
    code = (
        "import signal, time; from ia3rt.bench.busy import busy_cores\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell ignores for what it runs beside it
        "with busy_cores() as processes: print(*processes, flush=True); time.sleep(60)"
    )
    measuring = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert measuring.stdout is not None
    processes = [int(process) for process in measuring.stdout.readline().split()]
    assert processes and all(map(computes, processes))
    measuring.send_signal(ending)
    measuring.wait(timeout=30)
    end = time.monotonic() + 30
    while any(map(computes, processes)):
        assert time.monotonic() < end, "they are still there"
        time.sleep(0.05)
