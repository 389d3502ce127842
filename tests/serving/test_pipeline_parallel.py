"""Two processes that each have half of the layers: every vector acts, and what one of them cannot read fails."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import openai
import pytest
from server import Server, ask, client, say
from small_model import save_small_model
from truth import Truth

NAMES = ["a1", "b1", "c1", "d1"]
SUM = "mix:a1*0.7+b1*0.3"


def right(truth: Truth, name: str, row: int, tokens: list[int]) -> bool:
    worn = [] if name == "base" else name.split("*")
    named, weights = (["a1", "b1"], [0.7, 0.3]) if name == SUM else (worn, None)
    return truth.greedy([tokens], *named, weights=weights, prompts=truth.prompts[row : row + 1]) == [tokens]


@pytest.mark.slow  # the servers' processes wait for each other by spinning
def test_two_stages(tmp_path: Path) -> None:
    """Then the store and the originals come and go under requests: right, or an error, and the server serves on."""
    save_small_model(tmp_path / "small")
    truth = Truth(tmp_path / "small", tmp_path / "adapters")
    for seed, name in enumerate(NAMES):
        truth.make_adapter(name, seed)
    options = ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--pipeline-parallel-size", "2"]
    options += ["--enable-lora", "--max-lora-rank", "1", "--max-loras", "2", "--max-cpu-loras", "2", "--lora-modules"]
    server = Server(tmp_path / "small", [*options, *(f"{name}={truth.folder / name}" for name in NAMES)], tmp_path)
    server.start()
    try:
        server.wait()
        prompts = truth.prompts.tolist()
        answers = {name: say(server, name, prompts[0]) for name in (*NAMES, "a1*b1", SUM, "base")}
        assert all(right(truth, name, 0, tokens) for name, tokens in answers.items())
        assert len({str(tokens) for tokens in answers.values()}) == len(answers)
        for _ in range(20):  # until a copy goes after the API server has looked, and before the workers do
            told = asyncio.run(_spoil(server, truth, prompts))
            assert all(tokens is not None for name, _, tokens in told if name == "base")
            assert all(right(truth, name, row, tokens) for name, row, tokens in told if tokens is not None)
            if "could not be read" in server.log.read_text():
                break
        assert all(right(truth, name, 1, say(server, name, prompts[1])) for name in (*NAMES, "c1*d1", "base"))
    finally:
        server.kill()
    assert "could not be read" in server.log.read_text()


async def _spoil(server: Server, truth: Truth, prompts: list[list[int]]) -> list[tuple[str, int, list[int] | None]]:
    async def one(api: openai.AsyncOpenAI, name: str, row: int) -> tuple[str, int, list[int] | None]:
        try:
            return name, row, await ask(api, name, prompts[row])
        except openai.APIStatusError as error:
            assert error.status_code in (500, 503, 507), error
            return name, row, None

    def move(away: bool) -> None:
        for name in NAMES:
            here, there = truth.folder / name, truth.folder / f"{name}-away"
            if here.exists() == away:
                here.rename(there) if away else there.rename(here)

    async with client(server) as api:
        names = [*NAMES, "a1*b1", "c1*d1", "base"]
        work = [asyncio.ensure_future(one(api, name, turn % 2)) for turn in range(16) for name in names]
        away = False
        while not all(task.done() for task in work):
            shutil.rmtree(server._folder / "cache" / "ia3rt", ignore_errors=True)
            away = not away
            move(away)
            await asyncio.sleep(0.05)
        move(False)
        return [task.result() for task in work]
