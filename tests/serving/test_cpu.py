"""What is set on a machine without a GPU: by what it has, and never over what its operator said."""

from __future__ import annotations

import pytest

from ia3rt.serving import cpu
from ia3rt.serving.cpu import BIND, CACHE, THREADS, Machine, settings

GIB = 1 << 30
PLAIN = Machine(32 * GIB, 16 * GIB, 8, 1)


def made(machine: Machine, environment: dict[str, str] | None = None, *options: str) -> dict[str, str]:
    told = settings(machine, environment or {}, options)
    assert all(setting.why for setting in told)
    return {setting.name: setting.value for setting in told}


def test_a_quarter_of_the_free_memory() -> None:
    assert made(PLAIN) == {CACHE: "4"}
    assert made(Machine(2 * GIB, GIB // 2, 8, 1)) == {CACHE: "1"}


def test_what_the_operator_said_stays() -> None:
    assert made(PLAIN, {CACHE: "9"}) == {}
    for option in ("--kv-cache-memory-bytes=1", "--gpu-memory-utilization=0.3", "--gpu_memory_utilization=0.3"):
        assert made(PLAIN, {}, option) == {}
    assert made(PLAIN, {BIND: "0-3"}, "-tp", "2") == {CACHE: "2"}
    assert made(PLAIN, {THREADS: "3"}) == {CACHE: "4", BIND: "nobind"}


@pytest.mark.parametrize(
    "options", [("--tensor-parallel-size", "2"), ("--tensor_parallel_size=2",), ("-tp", "2"), ("-pp", "2")]
)
def test_two_processes_share(options) -> None:
    assert made(PLAIN, {}, *options) == {CACHE: "2", BIND: "nobind", THREADS: "3"}
    assert made(Machine(32 * GIB, 16 * GIB, 8, 2), {}, *options) == {CACHE: "2"}


def test_a_container_that_may_use_some_of_the_cores() -> None:
    assert made(Machine(32 * GIB, 16 * GIB, 4, 1, is_limited=True)) == {CACHE: "4", BIND: "nobind", THREADS: "3"}
    assert made(Machine(32 * GIB, 16 * GIB, 0.5, 1, is_limited=True))[THREADS] == "1"


def test_a_control_groups_limits(tmp_path, monkeypatch) -> None:
    """Those of the group around it too, and none where it says none."""
    monkeypatch.setattr(cpu, "_CGROUPS", tmp_path)
    before = cpu.this_machine()
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.setattr(cpu, "_own_cgroups", lambda: [inner, inner.parent])
    for folder, memory, used, cores in (
        (inner, "max", "7", "max 100000"),
        (inner.parent, 5 * GIB, GIB, "50000 100000"),
    ):
        (folder / "memory.max").write_text(f"{memory}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "cpu.max").write_text(f"{cores}\n")
    found = cpu.this_machine()
    assert found.cores == 0.5 and found.is_limited and found.memory <= 5 * GIB and found.free <= 4 * GIB
    assert not before.is_limited and before.cores >= 1 and 0 < before.free < before.memory
