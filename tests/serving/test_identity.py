"""Names and what they stand for, numbers, limits and labels, on a real server with a small model."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path

import httpx
import openai
import pytest
from server import Server, ask, client, say
from truth import Truth, greedy_with_lora

LONG = "A" * 5000


@pytest.fixture
def truth(small_truth: Truth) -> Truth:
    return small_truth


@pytest.fixture
def server(small_server: Server) -> Server:
    return small_server


def post(server: Server, path: str, **body: object) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=120)


def load(server: Server, name: str, folder: Path | str, **more: object) -> httpx.Response:
    return post(server, "/v1/load_lora_adapter", lora_name=name, lora_path=str(folder), **more)


def unload(server: Server, name: str) -> httpx.Response:
    return post(server, "/v1/unload_lora_adapter", lora_name=name)


def refusal(response: httpx.Response) -> str:
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert "\n" not in message
    return message


def told(truth: Truth, tokens: list[int], kind: str) -> bool:
    """Whether a greedy answer is what PEFT's adapter or LoRA of that name gives."""
    prompts = truth.prompts[:1]
    if kind == "lora":
        return [tokens] == greedy_with_lora(truth.model, truth.folder / "lora", prompts, [tokens])
    return [tokens] == truth.greedy([tokens], kind, prompts=prompts)


def test_large_scales_are_refused(server, truth) -> None:
    for name, value in (("mix:a*1e38+b*0.3", "1e+38"), ("delta:a*1e300", "1e+300"), ("mix:a*900+a*900", "1800")):
        message = refusal(post(server, "/v1/completions", model=name, prompt="x", max_tokens=1))
        assert "'a'" in message and "model.layers." in message and value in message
    body = {"ids": ["a", "b"], "weights": [0.1, -3e38]}
    message = refusal(post(server, "/v1/completions", model="base", prompt="x", max_tokens=1, merged_adapters=body))
    assert "'b'" in message and "-3e+38" in message
    message = refusal(load(server, "poison", truth.folder / "large"))
    assert "'poison'" in message and "model.layers.1.self_attn.v_proj" in message and "3e+38" in message
    for name in ("large", "large*a"):  # the resolver finds it
        message = refusal(post(server, "/v1/completions", model=name, prompt="x", max_tokens=1))
        assert "'large'" in message and "3e+38" in message
    assert told(truth, say(server, "a", truth.prompts[0].tolist()), "a")


def test_a_name_is_what_was_loaded_last(server, truth) -> None:
    """IA³, a LoRA in place, the same IA³ in place; with load and unload too."""
    ids = truth.prompts[0].tolist()
    for kind in ("a", "lora", "a", "lora", "lora", "b", "a"):
        assert load(server, "chat", truth.folder / kind, load_inplace=True).status_code == 200
        assert told(truth, say(server, "chat", ids), kind), kind
    for kind in ("lora", "a", "lora", "b"):
        assert unload(server, "chat").status_code == 200
        assert load(server, "chat", truth.folder / kind).status_code == 200
        assert told(truth, say(server, "chat", ids), kind), kind
    assert "chat" in {card["id"] for card in httpx.get(f"{server.url}/v1/models").json()["data"]}
    assert unload(server, "chat").status_code == 200


def test_what_runs_keeps_what_it_began_with(server, truth) -> None:
    """Answers while the name changes its kind over and over: each is the IA³ adapter's or the LoRA's, whole."""
    ids = truth.prompts[0].tolist()
    assert load(server, "swapped", truth.folder / "a").status_code == 200

    async def swap(http: httpx.AsyncClient, ended: asyncio.Event) -> None:
        for turn in itertools.count():
            if ended.is_set():
                return
            body = {"lora_name": "swapped", "lora_path": str(truth.folder / ("lora", "a", "b")[turn % 3])}
            done = await http.post("/v1/load_lora_adapter", json={**body, "load_inplace": True})
            assert done.status_code == 200, done.text

    async def run() -> list[list[int]]:
        limits = httpx.Limits(max_keepalive_connections=0)
        async with client(server) as api, httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
            ended = asyncio.Event()
            swapping = asyncio.create_task(swap(http, ended))
            answers: list[list[int]] = []
            while len(answers) < 24 or (len(answers) < 240 and len({*map(tuple, answers)}) < 2):  # however busy it is
                answers += await asyncio.gather(*(ask(api, "swapped", ids) for _ in range(4)))
                assert not swapping.done() or swapping.exception() is None, swapping.exception()
            ended.set()
            await swapping
            return answers

    answers = asyncio.run(run())
    distinct = [list(tokens) for tokens in {tuple(tokens) for tokens in answers}]
    assert len(distinct) > 1
    assert all(any(told(truth, tokens, kind) for kind in ("a", "b", "lora")) for tokens in distinct)
    assert unload(server, "swapped").status_code == 200 and server.is_up()


def test_a_reload_answers_with_the_old_or_the_new_numbers(server, truth) -> None:
    """Whole, alone and in a mix; what begins after it, with the new. What is gone is 404, and what runs goes on."""
    ids, prompts = truth.prompts[0].tolist(), truth.prompts[:1]
    mixed = "mix:racing*0.6+a*0.4"
    assert load(server, "racing", truth.folder / "a").status_code == 200

    def right(name: str, tokens: list[int], kind: str) -> bool:
        worn = {"racing": ([kind], None), mixed: ([kind, "a"], [0.6, 0.4])}[name]
        worn = (["a"], None) if name == mixed and kind == "a" else worn  # which adds up to a
        return [tokens] == truth.greedy([tokens], *worn[0], weights=worn[1], prompts=prompts)

    async def swap(api: openai.AsyncOpenAI, http: httpx.AsyncClient) -> list[tuple[str, str, list[int]]]:
        after = []
        for turn in range(16):
            kind = "ba"[turn % 2]
            body = {"lora_name": "racing", "lora_path": str(truth.folder / kind), "load_inplace": True}
            done = await http.post("/v1/load_lora_adapter", json=body)
            assert done.status_code == 200, done.text
            name = ("racing", mixed)[turn // 2 % 2]
            after.append((name, kind, await ask(api, name, ids)))
        return after

    async def unloaded(api: openai.AsyncOpenAI, http: httpx.AsyncClient, name: str) -> list[int]:
        """An answer in the midst of which its adapter is unloaded."""
        body = {"return_token_ids": True, "ignore_eos": True}
        stream = await api.completions.create(
            model=name, prompt=ids, max_tokens=12, temperature=0, stream=True, extra_body=body
        )
        parts = aiter(stream)
        tokens = [*(await anext(parts)).choices[0].model_extra["token_ids"]]
        done = await http.post("/v1/unload_lora_adapter", json={"lora_name": "racing"})
        assert done.status_code == 200, done.text
        late = await asyncio.gather(*(ask(api, late, ids) for late in ("racing", mixed) * 4), return_exceptions=True)
        assert all(isinstance(error, openai.NotFoundError) for error in late), late
        async for part in parts:
            tokens += part.choices[0].model_extra["token_ids"] or []
        return tokens

    async def run() -> None:
        limits = httpx.Limits(max_keepalive_connections=0)
        async with client(server) as api, httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
            swapping = asyncio.create_task(swap(api, http))
            answers: set[tuple[str, tuple[int, ...]]] = set()
            while not swapping.done():
                names = ["racing", mixed] * 12
                got = await asyncio.gather(*(ask(api, name, ids) for name in names))
                answers |= {(name, tuple(tokens)) for name, tokens in zip(names, got, strict=True)}
            for name, kind, tokens in await swapping:
                assert right(name, tokens, kind), (name, kind)
            assert len(answers) == 4
            assert all(any(right(name, list(tokens), kind) for kind in "ab") for name, tokens in answers)
            for name in ("racing", mixed):
                body = {"lora_name": "racing", "lora_path": str(truth.folder / "b"), "load_inplace": True}
                assert (await http.post("/v1/load_lora_adapter", json=body)).status_code == 200
                assert right(name, await unloaded(api, http, name), "b")

    asyncio.run(run())


def test_names_that_look_like_the_plugins_own(server, truth) -> None:
    ids = truth.prompts[0].tolist()
    names = ["x", *(f"x#{number}" for number in range(40)), "x@ia3:51", "a#0", "b#1#2"]
    for name in names:
        assert load(server, name, truth.folder / "b").status_code == 200
    assert load(server, "x", truth.folder / "lora", load_inplace=True).status_code == 200
    assert load(server, "x", truth.folder / "a", load_inplace=True).status_code == 200

    async def all_at_once() -> list[list[int]]:
        async with client(server) as api:
            return await asyncio.gather(*(ask(api, name, ids) for name in (*names, "a*b")))

    first, *others, product = asyncio.run(all_at_once())
    assert told(truth, first, "a") and told(truth, others[0], "b") and all(tokens == others[0] for tokens in others)
    assert [product] == truth.greedy([product], "a", "b", prompts=truth.prompts[:1])
    answer = post(server, "/v1/completions", model="x#7", prompt="x", max_tokens=1)
    assert answer.json()["model"] == "x#7"
    assert set(names) <= {card["id"] for card in httpx.get(f"{server.url}/v1/models").json()["data"]}
    assert all(unload(server, name).status_code == 200 for name in names)


@pytest.mark.parametrize("name", ["a*b", "mix:a", "delta:a*0.5", "mix:", "*"])
def test_no_adapter_is_loaded_under_a_name_that_means_a_mix(server, truth, name) -> None:
    for kind in ("a", "lora"):
        assert name in refusal(load(server, name, truth.folder / kind))


def test_no_path_means_a_mix(server, truth) -> None:
    told = {
        "adapters": ["a"],
        "weights": [1e38],
        "combination_type": "linear",
        "folders": {"a": str(truth.folder / "a")},
    }
    for path in ("ia3rt-mix:" + json.dumps(told), " ia3rt-mix:{}", "ia3rt-mix:"):
        assert "mix" in refusal(load(server, "inner", path))
    assert post(server, "/v1/completions", model="inner", prompt="x", max_tokens=1).status_code == 404


@pytest.mark.parametrize("name", ["a*b", "mix:a", "a+b", "a b", " a", "a*0.5"])
def test_ids_are_names(server, name) -> None:
    for strategy in ("linear", "product"):
        body = {"ids": [name], "merge_strategy": strategy}
        response = post(server, "/v1/completions", model="base", prompt="x", max_tokens=1, merged_adapters=body)
        assert name in refusal(response)


def test_errors_repeat_little_of_what_was_sent(server) -> None:
    bodies = [
        {"model": LONG},
        *(
            {"model": model.replace("A", LONG)}
            for model in ("A*b", "mix:A", "mix:a*A", "mix:A*1+b*A", "A*", "mix:a*1 A")
        ),
        {"model": LONG, "merged_adapters": {"ids": ["a"]}},
        *(
            {"model": "base", "merged_adapters": merged}
            for merged in (
                LONG,
                [LONG],
                {LONG: 1},
                {"ids": LONG},
                {"ids": [LONG]},
                {"ids": [LONG, LONG], "weights": [1]},
                {"ids": ["a"], "weights": LONG},
                {"ids": ["a"], "merge_strategy": LONG},
            )
        ),
    ]
    answers = [post(server, "/v1/completions", prompt="x", max_tokens=1, **body) for body in bodies]
    answers += [load(server, LONG, "/nowhere"), load(server, "x", "/" + LONG), load(server, LONG + "*", "/x")]
    answers += [load(server, "x", "ia3rt-mix:" + LONG), unload(server, LONG)]
    for answer in answers:
        assert answer.status_code in (400, 404, 500), answer.text
        assert answer.json()["error"]["message"].count("A") <= 81, answer.text


def test_labels_do_not_grow_with_mixes(server, truth) -> None:
    async def many() -> None:
        async with client(server) as api:
            for start in range(0, 120, 6):
                names = [f"mix:a*{1 + number / 1000}+b*0.5" for number in range(start, start + 6)]
                await asyncio.gather(*(ask(api, name, truth.prompts[0].tolist()) for name in names))

    asyncio.run(many())
    series = [name for name in server.metrics() if name.startswith("vllm:lora_requests_info")]
    assert 0 < len(series) <= 20 and not any("mix:" in name for name in series), series
