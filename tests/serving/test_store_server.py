"""The store under a real server: whatever happens to it, an answer is right or an error, and the server serves on."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from server import Server, ask, client, say
from truth import Truth

from ia3rt.serving.settings import ALLOW_ADAPTERS, KEY_FOR_ALL

OPTIONS = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--enable-lora", "--max-lora-rank", "8"]
OPTIONS += ["--max-loras", "2", "--max-cpu-loras", "2", "--block-size", "32", "--max-num-seqs", "4"]
KEY = "none"  # what the tests' client sends
NAMES = ["a00", "a01", "a02", "a03"]


@pytest.fixture(scope="module")
def folders(truth: Truth, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Originals that a test may spoil, and the LoRA."""
    copied = tmp_path_factory.mktemp("originals")
    for name in [*NAMES, "lora"]:
        shutil.copytree(truth.folder / name, copied / name)
    return copied


@pytest.fixture(scope="module")
def small(model: Path, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two slots, two places behind them, and a key: what another request needs is read again all the time."""
    modules = [f"{name}={folders / name}" for name in (*NAMES, "lora")]
    root = tmp_path_factory.mktemp("small")
    server = Server(model, [*OPTIONS, "--api-key", KEY, "--lora-modules", *modules], root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_FOR_ALL, "1")
        patch.setenv(ALLOW_ADAPTERS, str(folders))
        server.start()
    server.wait()
    server.store = root / "cache" / "ia3rt" / "adapters"
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def serves_on(small: Server) -> Iterator[None]:
    yield
    assert small.is_up()


def is_right(truth: Truth, name: str, row: int, tokens: list[int]) -> bool:
    worn = [] if name == "base" else name.split("*")
    return truth.greedy([tokens], *worn, prompts=truth.prompts[row : row + 1]) == [tokens]


def evict(small: Server, truth: Truth) -> None:
    for name in ("a02", "a03", "a02*a03"):
        say(small, name, truth.prompts[0].tolist())


def test_what_was_removed_is_written_anew(small, truth) -> None:
    for name in NAMES:
        assert is_right(truth, name, 0, say(small, name, truth.prompts[0].tolist()))
    shutil.rmtree(small.store)
    for name in [*NAMES, "a00*a01"]:
        assert is_right(truth, name, 1, say(small, name, truth.prompts[1].tolist()))


def test_without_originals_requests_fail_and_no_other(small, truth, folders) -> None:
    evict(small, truth)
    shutil.move(folders / "a00", folders / "away")
    (copy,) = (folder for folder in small.store.iterdir() if _is_of(folder, truth, "a00"))
    for file in copy.iterdir():
        os.truncate(file, 20)
    with pytest.raises(openai.APIStatusError) as refused:
        say(small, "a00", truth.prompts[0].tolist())
    assert refused.value.status_code == 503 and "'a00'" in str(refused.value)
    assert is_right(truth, "a01", 0, say(small, "a01", truth.prompts[0].tolist()))
    shutil.move(folders / "away", folders / "a00")
    assert is_right(truth, "a00", 0, say(small, "a00", truth.prompts[0].tolist()))


def test_the_store_goes_while_requests_wait_in_the_engine(small, truth, folders) -> None:
    """Over and over, under eight requests for each adapter, with LoRAs' files gone too: right, or an error."""
    prompts = truth.prompts.tolist()
    names = [*NAMES, "a00*a01", "a02*a03", "base"]

    async def one(api: openai.AsyncOpenAI, name: str, row: int) -> tuple[str, int, list[int] | None]:
        try:
            return name, row, await ask(api, name, prompts[row])
        except openai.APIStatusError as error:
            assert error.status_code in (500, 503, 507), error  # 507: the store went while a copy was written
            return name, row, None

    async def spoil(work: list[asyncio.Task]) -> None:
        turn = 0
        while not all(task.done() for task in work):
            shutil.rmtree(small.store, ignore_errors=True)
            if turn % 2:
                (folders / "a01").rename(folders / "a01-away") if (folders / "a01").exists() else (
                    folders / "a01-away"
                ).rename(folders / "a01")
            turn += 1
            await asyncio.sleep(0.2)

    async def run() -> list[tuple[str, int, list[int] | None]]:
        async with client(small) as api:
            work = [asyncio.ensure_future(one(api, name, number % 2)) for number in range(8) for name in names]
            await asyncio.gather(spoil(work), *work)
            return [task.result() for task in work]

    answers = asyncio.run(run())
    if (folders / "a01-away").exists():
        (folders / "a01-away").rename(folders / "a01")
    assert all(tokens is not None for name, _, tokens in answers if name == "base")
    given = {(name, row, tuple(tokens)) for name, row, tokens in answers if tokens is not None}
    assert all(is_right(truth, name, row, list(tokens)) for name, row, tokens in given)
    assert any(tokens is None for _, _, tokens in answers)
    for name in names:
        assert is_right(truth, name, 0, say(small, name, prompts[0]))


def test_the_key_opens_every_door_and_the_folder_confines(small, truth, folders) -> None:
    def post(path: str, key: str | None = None, **body: object) -> int:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{small.url}{path}", json=body, headers=headers, timeout=60).status_code

    asked = {"model": "base", "prompt": "x", "max_tokens": 1}
    loaded = {"name": "new", "src": str(folders / "a00")}
    for path, body in (("/invocations", asked), ("/adapters", loaded), ("/tokenize", {"model": "base", "prompt": "x"})):
        assert post(path, **body) == 401
        assert post(path, KEY, **body) == 200
    assert httpx.get(f"{small.url}/metrics", timeout=60).status_code == 200
    elsewhere = {"lora_name": "other", "lora_path": str(truth.folder / "other")}
    assert post("/v1/load_lora_adapter", KEY, **elsewhere) == 403
    assert post("/adapters", KEY, name="other", src=elsewhere["lora_path"]) == 403


def _is_of(copy: Path, truth: Truth, name: str) -> bool:
    from safetensors.torch import load_file

    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (copy, truth.folder / name))
    return mine.keys() == theirs.keys() and all(mine[key].equal(theirs[key]) for key in mine)
