"""Numbers, names and locks of adapters, on vLLM's own OpenAIServingModels; only the engine behind it is replaced."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.lora.request import LoRARequest

from ia3rt.adapters.mix import Mix
from ia3rt.serving.vllm import adapter_numbers, register
from ia3rt.serving.vllm.adapter_numbers import FIRST_MIX, AdapterNumbers, MixNumbers
from ia3rt.serving.vllm.requests import public_name
from ia3rt.serving.vllm.source import Source


class Engine:
    """Takes every adapter, except where its path says otherwise."""

    def __init__(self) -> None:
        self.errored = False
        self.model_config = SimpleNamespace(dtype=torch.float32, model="base", max_model_len=8)
        self.renderer = self.input_processor = None
        parallel = SimpleNamespace(_api_process_rank=0, _api_process_count=1)
        self.vllm_config = SimpleNamespace(parallel_config=parallel)
        self.taken: list[LoRARequest] = []

    async def add_lora(self, request: LoRARequest) -> bool:
        if request.lora_path.endswith("refused"):
            raise ValueError("refused")
        self.taken.append(request)
        return True


class Resolver:
    """Finds names that begin with `found`, after a while, as one that looks on a disk or a hub."""

    async def resolve_lora(self, base: str, name: str) -> LoRARequest | None:
        await asyncio.sleep(0)
        return LoRARequest(name, 1, f"/adapters/{name}") if name.startswith("found") else None


@pytest.fixture
def models(tmp_path, monkeypatch) -> Any:
    register()
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    made = OpenAIServingModels(Engine(), [BaseModelPath("base", "base")])
    made.lora_resolvers = [Resolver()]
    for name in ("lora", "refused"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    made.folder = tmp_path
    return made


async def load(models: Any, name: str, path: str = "lora", **more: Any) -> Any:
    path = path and str(models.folder / path)
    return await models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=name, lora_path=path, **more))


def test_what_is_not_found_counts_nothing_and_keeps_nothing(models) -> None:
    async def ask() -> None:
        for start in range(0, 20_000, 100):
            await asyncio.gather(*(models.resolve_lora(f"nobody{start + number}") for number in range(100)))
            await models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=f"nobody{start}"))
            await load(models, f"nobody{start}", "refused" if start % 1000 == 0 else "")
        found = await asyncio.gather(*(models.resolve_lora(f"found{number}") for number in range(50)))
        assert len({request.lora_int_id for request in found}) == len({request.lora_name for request in found}) == 50
        # 100 were looked for at once, and each refused load took one.
        assert max(request.lora_int_id for request in found) <= 200

    asyncio.run(ask())
    assert len(models.lora_resolver_lock) == 0
    assert len(models.engine_client.taken) == 50


def test_ranges_cannot_meet(models, monkeypatch) -> None:
    monkeypatch.setattr(models.lora_id_counter, "_value", FIRST_MIX - 3)
    numbers = [models.lora_id_counter.inc(1) for _ in range(2)]
    assert numbers == [FIRST_MIX - 2, FIRST_MIX - 1]
    with pytest.raises(OverflowError, match="start the server anew"):
        models.lora_id_counter.inc(1)
    mix = models.ia3rt_requests.mix(Source(Mix(("a", "b")), {"a": "/a", "b": "/b"}))
    assert FIRST_MIX <= mix.lora_int_id < 2**31


def test_mixes_begin_again_with_numbers_that_none_has(monkeypatch) -> None:
    monkeypatch.setattr(adapter_numbers, "END", FIRST_MIX + 10)
    servers = [MixNumbers(rank, 2) for rank in range(2)]
    had = [[server.take({FIRST_MIX, FIRST_MIX + 1}) for _ in range(12)] for server in servers]
    assert not set(had[0]) & set(had[1])
    assert all(FIRST_MIX + 2 <= number < FIRST_MIX + 10 for number in itertools.chain(*had))
    assert had[0][:4] == had[0][4:8]


def test_a_number_that_was_given_back_is_given_once() -> None:
    numbers = AdapterNumbers()
    with numbers.lent() as lent:
        first = numbers.inc(1)
    second = numbers.inc(1)
    numbers.give_back(lent)
    assert lent == [first] and numbers.inc(1) == first and numbers.inc(1) not in (first, second)


def test_a_lora_never_takes_the_place_of_what_may_run(models) -> None:
    """Loaded in place, loaded again, or found: another number and name in the engine, and outside the users' own."""

    async def run() -> list[LoRARequest]:
        had = []
        for turn in range(6):
            assert "Success" in await load(models, "chat", load_inplace=True)
            had.append(models.lora_requests["chat"])
            if turn % 2:
                await models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name="chat"))
        for _ in range(3):
            had.append(await models.resolve_lora("found"))
            assert await models.resolve_lora("found") is had[-1]
            await models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name="found"))
        for name in ("chat#1", "found#2"):
            await load(models, name)
            had.append(models.lora_requests[name])
        return had

    had = asyncio.run(run())
    assert len({request.lora_int_id for request in had}) == len({request.lora_name for request in had}) == len(had)
    shown = [public_name(request.lora_name) for request in had]
    assert shown == ["chat"] * 6 + ["found"] * 3 + ["chat#1", "found#2"]
    assert not any(request.load_inplace for request in had)


def test_no_name_stands_in_the_way_of_another(models) -> None:
    """Whatever numbers clients put behind names, before and while another is loaded."""
    names = ["chat", *(f"chat#{number}" for number in range(100, 160))]

    async def run() -> None:
        for name in names[1:]:
            assert "Success" in await load(models, name)
        await asyncio.gather(*(load(models, name, load_inplace=True) for name in names * 2))

    asyncio.run(run())
    assert sorted(models.lora_requests) == sorted(names)
    assert all(public_name(request.lora_name) == name for name, request in models.lora_requests.items())
    assert len({request.lora_name for request in models.lora_requests.values()}) == len(names)


def test_a_refused_lora_leaves_what_was_there(models) -> None:
    async def run() -> None:
        await load(models, "chat")
        before = models.lora_requests["chat"]
        answer = await load(models, "chat", "refused", load_inplace=True)
        assert answer.error.code == 400 and "#" not in answer.error.message
        assert models.lora_requests == {"chat": before} and models.lora_requests["chat"] is before
        assert (await load(models, "chat")).error.code == 400

    asyncio.run(run())


def test_a_hundred_thousand_mixes_are_remembered_in_little(models) -> None:
    requests = models.ia3rt_requests
    folders = {f"adapter{number:03d}": f"/store/{number:032x}" for number in range(64)}
    names: set[str] = set()
    for number in range(100_000):
        few = dict(itertools.islice(folders.items(), number % 3 + 1))
        weights = tuple(number / 1e6 + place for place in range(len(few)))
        names.add(requests.mix(Source(Mix(tuple(few), weights, "linear"), few)).lora_name)
    assert len(names) == 100_000 and len(requests._known) <= 10_000 and len(requests._mixes) == len(requests._known)
    long = Source(Mix(tuple(folders), tuple(range(64)), "linear"), folders)
    for number in range(20_000):
        requests.mix(Source(Mix(long.mix.adapters, (*range(63), number), "linear"), folders))
    assert sum(len(path) for _, path in requests._known) <= 1 << 24
