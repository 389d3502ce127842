"""What vLLM has to be told on a machine without a GPU, where its own defaults end at the start or slow down everything.

It keeps keys and values in main memory: by default in 92 % of it, which has to be free then. It binds threads to cores:
to one NUMA node a process, and to all cores that it sees, also where a container may use a few of them only.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ia3rt.serving.settings import Setting

CACHE = "VLLM_CPU_KVCACHE_SPACE"
BIND = "VLLM_CPU_OMP_THREADS_BIND"
THREADS = "OMP_NUM_THREADS"
_GIB = 1 << 30
_SHARE = 4
"""A quarter of the free memory is for the cache: the weights, which come before it, may take the rest."""
_CACHE_OPTIONS = ("--kv-cache-memory-bytes", "--gpu-memory-utilization")
_PROCESSES = (
    ("--pipeline-parallel-size", "-pp"),
    ("--tensor-parallel-size", "-tp"),
    ("--data-parallel-size", "-dp"),
)
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """What a process may use here.

    Attributes:
        memory: bytes.
        free: how many of them are.
        cores: how many at a time; less than 1 in a small container.
        nodes: NUMA nodes.
        is_limited: whether a container's quota, and not the machine, says how many cores.
    """

    memory: int
    free: int
    cores: float
    nodes: int
    is_limited: bool = False


def is_cpu_build() -> bool:
    """Whether the installed vLLM computes on the CPU, by what vLLM itself asks."""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu" or sys.platform == "darwin":
        return True
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return _is_installed("vllm-cpu")


def settings(machine: Machine, environment: Mapping[str, str], options: Sequence[str]) -> list[Setting]:
    """What to set on a CPU, of what the operator has not said.

    Args:
        machine: what there is.
        environment: what the operator has set.
        options: vLLM's, as the operator gave them.
    """
    processes = math.prod(_number(names, options) for names in _PROCESSES)
    each = "" if processes == 1 else f" for each of {processes} processes"
    made = []
    given = {option.partition("=")[0].replace("_", "-") for option in options}
    if not environment.get(CACHE) and not given & set(_CACHE_OPTIONS):
        free = f"{machine.free / _GIB:.1f} of {machine.memory / _GIB:.1f} GiB are free{each}"
        room = max(1, machine.free // (_SHARE * processes * _GIB))
        made.append(Setting(CACHE, str(room), f"GiB for keys and values: {free}; vLLM's own default is 92 % of all"))
    threads, bind = environment.get(THREADS), environment.get(BIND)
    if bind:
        return made
    if threads:
        why = f"so that {THREADS}={threads} counts, which vLLM's binding of threads to cores overrides"
        return [*made, Setting(BIND, "nobind", why)]
    if processes > machine.nodes:
        why = f"vLLM binds one process to a NUMA node: there are {processes}, and {machine.nodes} node(s)"
    elif machine.is_limited:
        why = f"vLLM binds a thread to every core that it sees, and {machine.cores:g} may be used here"
    else:
        return made
    made.append(Setting(BIND, "nobind", why))
    count = max(1, int(machine.cores) // processes - 1)
    made.append(Setting(THREADS, str(count), f"of {machine.cores:g} cores{each}; one is left to what schedules"))
    return made


def this_machine() -> Machine:
    """What this process may use, also in a container or under systemd's limits."""
    import psutil  # which comes with vLLM

    memory, free, allowed = psutil.virtual_memory().total, psutil.virtual_memory().available, _allowed_cores()
    cores = float(min(allowed, psutil.cpu_count(logical=False) or allowed))
    limit = cores
    for folder in _own_cgroups():
        most, used = _read(folder / "memory.max"), _read(folder / "memory.current")
        if most and used and most[0].isdigit():
            memory, free = min(memory, int(most[0])), min(free, max(0, int(most[0]) - int(used[0])))
        quota = _read(folder / "cpu.max")
        if len(quota) == 2 and quota[0].isdigit():
            limit = min(limit, int(quota[0]) / int(quota[1]))
    nodes = sum(1 for _ in Path("/sys/devices/system/node").glob("node[0-9]*"))
    return Machine(memory, free, limit, max(1, nodes), limit < cores)


def _allowed_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _own_cgroups() -> list[Path]:
    """This process's control group, of version 2, and those around it, each of which may have limits."""
    found = [line.removeprefix("0::/") for line in _lines(Path("/proc/self/cgroup")) if line.startswith("0::/")]
    folders = [_CGROUPS / within for within in found]
    return [_CGROUPS, *folders, *(each for folder in folders for each in folder.parents if _CGROUPS in each.parents)]


def _read(file: Path) -> list[str]:
    return " ".join(_lines(file)).split()


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _number(names: tuple[str, ...], options: Sequence[str]) -> int:
    """What one of vLLM's options says, under any of its names; 1 where it is not given."""
    for place, option in enumerate(options):
        name, _, value = option.partition("=")
        if name.replace("_", "-") in names:
            value = value or "".join(options[place + 1 : place + 2])
            return int(value) if value.isdigit() and int(value) else 1
    return 1


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
