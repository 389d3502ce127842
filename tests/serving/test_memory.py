"""A live server's memory under mixes without end: no process of it grows with how many there were."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest
from server import Server, client
from small_model import save_small_model
from truth import Truth

MIXES = 10_000
AT_ONCE = 16
GROWTH = 24
"""MB that a process may have more at the end than at the half: mixes are remembered, of a kilobyte or two each."""


def memory(server: Server) -> dict[str, float]:
    """MB of each process's own, by what it is."""
    api = psutil.Process(server._process.pid)
    processes = [api, *api.children(recursive=True)]
    used = {process: process.memory_info().rss / 1e6 for process in processes if process.is_running()}
    return {f"{number} {process.name()}": used[process] for number, process in enumerate(used)}


async def ask_for(server: Server, numbers: range) -> None:
    waiting = iter(numbers)

    async def one(api) -> None:
        for number in waiting:
            # Weights that no other number has.
            name = f"mix:a*{0.5 + number / 4 / MIXES!r}+b*{0.5 - number / 4 / MIXES!r}"
            await api.completions.create(model=name, prompt="x", max_tokens=1, temperature=0)

    async with client(server) as api:
        await asyncio.gather(*(one(api) for _ in range(AT_ONCE)))


@pytest.mark.slow
def test_memory_stays(tmp_path: Path) -> None:
    model = tmp_path / "small"
    save_small_model(model)
    truth = Truth(model, tmp_path / "adapters")
    for seed, name in enumerate(["a", "b"]):
        truth.make_adapter(name, seed)
    options = [
        "--dtype",
        "float32",
        "--max-model-len",
        "128",
        "--enforce-eager",
        "--enable-lora",
        "--max-lora-rank",
        "1",
    ]
    options += ["--max-loras", "16", "--max-cpu-loras", "32", "--lora-modules"]
    server = Server(model, [*options, *(f"{name}={truth.folder / name}" for name in ("a", "b"))], tmp_path)
    server.start()
    try:
        server.wait()
        asyncio.run(ask_for(server, range(200)))  # whatever is made once
        seen = [memory(server)]
        for first, last in ((200, MIXES // 4), (MIXES // 4, MIXES // 2), (MIXES // 2, MIXES)):
            asyncio.run(ask_for(server, range(first, last)))
            seen.append(memory(server))
            print({name: round(used) for name, used in seen[-1].items()})
    finally:
        server.kill()
    assert all(seen[-1][name] - used < GROWTH for name, used in seen[-2].items()), seen
