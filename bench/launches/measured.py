"""Times the way from a drop-in's forward to the call that launches, beside torch's own op: `ia3rt bench launch`.

The CPU is taken for an H100. Kernels are compiled for it, and everything that Python does for a launch is done; the C
launcher is replaced by a function that does nothing. So what is timed is what a GPU waits for in eager decoding, on
this machine's processor, less the driver's own part.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

from ia3rt.bench.captured import loop
from ia3rt.bench.interleaved import sample_interleaved

UNIT = "torch.mul"
CALLS, ROUNDS = 200, 60


@dataclass(frozen=True)
class HostTime:
    """What one operation costs the host.

    Attributes:
        operation: what is launched, and by whom.
        launches: how many kernels that are.
        microseconds: from the drop-in's forward to the last launch; the median over rounds.
        units: the same in times of torch.mul(x, y) on 16 numbers; the median of the rounds' ratios.
        op_microseconds: the same of the public op, which checks all its arguments; None where there is none.
        op_units: the same.
    """

    operation: str
    launches: int
    microseconds: float
    units: float
    op_microseconds: float | None
    op_units: float | None


def host_times() -> tuple[float, list[HostTime]]:
    """Return torch.mul's microseconds, and each operation's times; measured in a process whose driver is replaced."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ia3rt.bench.launches.measured"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"timing launches failed: {done.stderr[-2000:]}")
    unit, times = json.loads(done.stdout.splitlines()[-1])
    return unit, [HostTime(**time) for time in times]


def _measure() -> tuple[float, list[HostTime]]:
    from ia3rt.bench.compiled.driver import stop_at_launches

    launched: list[None] = []
    stop_at_launches(lambda *_: launched.append(None))
    import torch

    from ia3rt.bench.launches.cases import cases

    torch.set_num_threads(1)
    ways: dict[str, Callable[[int], object]] = {}
    counts: dict[str, int] = {}
    for name, drop_in, op in cases():
        for _ in range(4):  # compiled, then noted, then launched directly
            launched.clear()
            drop_in()
            counts[name] = len(launched)
        ways[name] = _turns(drop_in)
        if op is not None:
            ways[f"{name}, op"] = _turns(op)
    x, y = torch.ones(16), torch.ones(16)
    ways[UNIT] = _turns(lambda: torch.mul(x, y))
    seconds = sample_interleaved(ways, range(ROUNDS), after=lambda _: launched.clear())
    unit = seconds[UNIT]

    def of(name: str) -> tuple[float, float] | tuple[None, None]:
        if name not in seconds:
            return None, None
        ratios = [each / one for each, one in zip(seconds[name], unit, strict=True)]
        return 1e6 * statistics.median(seconds[name]) / CALLS, statistics.median(ratios)

    times = []
    for name, count in counts.items():
        microseconds, units = of(name)
        assert microseconds is not None and units is not None
        times.append(HostTime(name, count, microseconds, units, *of(f"{name}, op")))
    return 1e6 * statistics.median(unit) / CALLS, times


def _turns(way: Callable[[], object]) -> Callable[[int], object]:
    run = loop(lambda _: way(), CALLS)
    return lambda _: run()


if __name__ == "__main__":
    unit, times = _measure()
    print(json.dumps([unit, [asdict(time) for time in times]]))
