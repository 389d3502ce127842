"""IA³ through vLLM's OpenAI server: every greedy answer is compared with HF + PEFT's, in float32."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from pathlib import Path

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file
from server import Server, ask, client, say
from truth import ADAPTERS, Truth, greedy_with_lora

SUM = "mix:a03*0.7+a04*0.3"
MIXES = {
    "a00*a01": (["a00", "a01"], None),
    "a02*a01*a05": (["a01", "a02", "a05"], None),
    SUM: (["a03", "a04"], [0.7, 0.3]),
    "mix:a06*1.5+a07*-0.5": (["a06", "a07"], [1.5, -0.5]),
}
"""Mixes by their names in requests: PEFT's adapters, and the weights of their sum."""
BAD = ["nobody", "a00*nobody", "mix:a00*much", "mix:", "a00**a01", "mix:a00*nan", "a00*lora", "*"]


def post(server: Server, path: str, **body: object) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=120)


def sentence(response: httpx.Response) -> str:
    message = response.json()["error"]["message"]
    assert "\n" not in message and "Traceback" not in message
    return message


class Load:
    """64 requests at a time over everything, while others are loaded, unloaded and refused.

    Attributes:
        answers: by the requests' model and prompt, what each of them got.
        refused: the statuses that bad requests got.
    """

    def __init__(self, server: Server, truth: Truth) -> None:
        prompts = truth.prompts.tolist()
        self.answers: dict[str, list[list[list[int]]]] = {}
        self.refused: list[int] = []
        named = [*ADAPTERS, *MIXES] + [*MIXES] * 2 + ["base", "lora"] * 6
        self._work = list(itertools.product(named, range(len(prompts))))
        random.Random(0).shuffle(self._work)
        asyncio.run(self._run(server, truth.folder / "other", prompts))

    async def _run(self, server: Server, other: Path, prompts: list[list[int]]) -> None:
        async with client(server) as api:
            answers = (self._answer(api, prompts) for _ in range(64))
            await asyncio.gather(self._disturb(server, api, other, prompts[0]), *answers)

    async def _answer(self, api: openai.AsyncOpenAI, prompts: list[list[int]]) -> None:
        while self._work:
            name, row = self._work.pop()
            tokens = await ask(api, name, prompts[row])
            self.answers.setdefault(name, [[] for _ in prompts])[row].append(tokens)

    async def _disturb(self, server: Server, api: openai.AsyncOpenAI, other: Path, prompt: list[int]) -> None:
        # A connection for each request: vLLM closes one that was idle for five seconds, which on a machine as busy as
        # this may be between two requests. (openai's client tries again.)
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
            for turn in itertools.takewhile(lambda _: self._work, itertools.count()):
                name = f"extra{turn}"
                for path, body in (("load", {"lora_path": str(other)}), ("unload", {})):
                    done = await http.post(f"/v1/{path}_lora_adapter", json={"lora_name": name, **body})
                    assert done.status_code == 200, done.text
                with pytest.raises(openai.APIStatusError) as refused:
                    await ask(api, BAD[turn % len(BAD)], prompt)
                self.refused.append(refused.value.status_code)


@pytest.fixture(scope="module")
def load(starting: Server, truth: Truth) -> Load:
    starting.wait()
    return Load(starting, truth)


@pytest.fixture(scope="module")
def expected(load: Load, truth: Truth, model: Path) -> dict[str, list[list[int]]]:
    """The truth, by the requests' model, for each prompt."""
    given = {name: [answers[0] for answers in rows] for name, rows in load.answers.items()}
    right = {name: truth.greedy(given[name], name) for name in ADAPTERS}
    right |= {name: truth.greedy(given[name], *worn, weights=weights) for name, (worn, weights) in MIXES.items()}
    right["base"] = truth.greedy(given["base"])
    right["lora"] = greedy_with_lora(model, truth.folder / "lora", truth.prompts, given["lora"])
    return right


def test_many_at_once(server, load, expected) -> None:
    assert load.answers == {
        name: [[tokens] * len(load.answers[name][0]) for tokens in rows] for name, rows in expected.items()
    }
    # Each adapter changes the answers: a mix-up would have shown.
    assert len({json.dumps(tokens) for tokens in expected.values()}) == len(ADAPTERS) + len(MIXES) + 2
    assert load.refused and set(load.refused) <= {400, 404}
    assert server.is_up()


def test_equal_mixes_are_one(server, truth, expected) -> None:
    prompt, tokens = truth.prompts[0].tolist(), expected[SUM][0]
    assert say(server, "mix: a04*0.3 + a03*0.7".replace(" ", ""), prompt) == tokens
    body = {"ids": ["a04", "a03"], "weights": [0.3, 0.7], "merge_strategy": "linear"}
    assert say(server, "base", prompt, merged_adapters=body) == tokens
    product = {"ids": ["a01", "a00"], "merge_strategy": "product"}
    assert say(server, "base", prompt, merged_adapters=product) == expected["a00*a01"][0]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"ids": ["a00"], "merge_strategy": "ties"}, "ties"),
        ({"ids": ["a00"], "weights": [1, 2]}, "weights"),
        ({"ids": [], "weights": []}, "ids"),
        ({"ids": ["a00"], "wieghts": [1]}, "wieghts"),
        (7, "merged_adapters"),
    ],
)
def test_a_body_that_means_no_mix_is_refused(server, body, told) -> None:
    response = post(server, "/v1/completions", model="base", prompt="x", max_tokens=1, merged_adapters=body)
    assert response.status_code == 400 and told in sentence(response)


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_means_no_mix_is_refused(server, name) -> None:
    response = post(server, "/v1/completions", model=name, prompt="x", max_tokens=1)
    assert response.status_code in (400, 404) and name in sentence(response)


def test_adapters_that_cannot_be_served_are_refused(server, truth, tmp_path) -> None:
    good = truth.folder / "other"
    config = (good / "adapter_config.json").read_text()
    vectors = load_file(good / "adapter_model.safetensors")
    key = next(key for key in vectors if "layers.3" in key and "k_proj" in key)
    made = {
        "wide": ({**vectors, key: torch.ones(999, 1)}, "model.layers.3.self_attn.k_proj"),
        "deep": ({**vectors, key.replace("layers.3.", "layers.300."): vectors[key].clone()}, "layers.300"),
        "nan": ({**vectors, key: vectors[key] * float("nan")}, "NaN"),
    }
    for name, (tensors, told) in made.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(config)
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        response = post(server, "/v1/load_lora_adapter", lora_name=name, lora_path=str(tmp_path / name))
        assert response.status_code == 400 and told in sentence(response) and name in sentence(response)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "adapter_config.json").write_text(config)
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(b"cut")
    response = post(server, "/v1/load_lora_adapter", lora_name="cut", lora_path=str(tmp_path / "cut"))
    assert response.status_code == 400 and "damaged" in sentence(response)
    names = {card["id"] for card in httpx.get(f"{server.url}/v1/models").json()["data"]}
    assert names == {"base", "lora", *ADAPTERS}


def test_a_name_loaded_again_means_the_new_numbers(server, truth) -> None:
    """In the same folder, with a prompt that fills blocks of the prefix cache."""
    prompt = truth.prompts.reshape(1, -1).repeat(1, 6)
    folder = truth.folder / "again"
    (truth.folder / "a00").rename(folder)
    try:
        assert post(server, "/v1/load_lora_adapter", lora_name="again", lora_path=str(folder)).status_code == 200
        ids = prompt[0].tolist()
        before = server.metrics()
        old = say(server, "again", ids)
        assert [old] == truth.greedy([old], "a00", prompts=prompt)
        assert say(server, "again", ids) == old
        hits = [name for name in before if name.startswith("vllm:prefix_cache_hits_total")]
        assert sum(server.metrics()[name] - before[name] for name in hits) > 0
        other = load_file(truth.folder / "other" / "adapter_model.safetensors")
        kept = load_file(folder / "adapter_model.safetensors")
        save_file(other, folder / "adapter_model.safetensors")
        response = post(server, "/v1/load_lora_adapter", lora_name="again", lora_path=str(folder), load_inplace=True)
        assert response.status_code == 200
        new = say(server, "again", ids)
        assert [new] == truth.greedy([new], "other", prompts=prompt) and new != old
        save_file(kept, folder / "adapter_model.safetensors")
        assert post(server, "/v1/unload_lora_adapter", lora_name="again").status_code == 200
        assert post(server, "/v1/load_lora_adapter", lora_name="again", lora_path=str(folder)).status_code == 200
        assert say(server, "again", ids) == old
        assert post(server, "/v1/unload_lora_adapter", lora_name="again").status_code == 200
    finally:
        folder.rename(truth.folder / "a00")


def test_resolvers_find_adapters(server, truth) -> None:
    """vLLM's filesystem resolver: "other" was not loaded; alone, and in a mix."""
    prompt = truth.prompts[:1]
    ids = prompt[0].tolist()
    for name in ("other*a00", "other"):  # the second is loaded by itself: the first unloads it
        tokens = say(server, name, ids)
        assert [tokens] == truth.greedy([tokens], *name.split("*"), prompts=prompt)
        assert post(server, "/v1/unload_lora_adapter", lora_name="other").status_code == 200


def test_metrics(server, truth) -> None:
    before = server.metrics()
    say(server, "a00*a02", truth.prompts[0].tolist())
    after = server.metrics()
    product = 'ia3rt:requests_total{kind="product"}'
    assert after[product] == before.get(product, 0) + 1
    assert after["ia3rt:slots"] == 6 and 1 <= after["ia3rt:slots_resident"] <= 6
    assert after["ia3rt:loads_total"] >= len(ADAPTERS) and after["ia3rt:evictions_total"] > 0
    assert {name.partition("{")[2] for name in after if name.startswith("ia3rt:") and "{" in name} <= {
        f'kind="{kind}"}}' for kind in ("adapter", "product", "linear", "delta")
    }


def test_killed_and_started_again(server, truth, expected) -> None:
    server.kill()
    assert not server.is_up()
    server.start()
    server.wait()
    for name in ("a31", SUM, "lora", "base"):
        assert say(server, name, truth.prompts[1].tolist()) == expected[name][1]
