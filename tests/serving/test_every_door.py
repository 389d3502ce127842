"""Every endpoint of vLLM's server that takes a model: adapters, mixes by name and as merged_adapters, and refusals.

The truth is the completions endpoint's answer, whose tokens are compared with PEFT's; a pooling model's are Hugging
Face's last hidden states.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from conftest import SMALL
from server import Server, ask, client, say
from truth import Truth

PROMPT = "Once upon a time"
TOKENS = 8
SUM = "mix:a*0.7+b*0.3"
BODIES = {SUM: {"ids": ["b", "a"], "weights": [0.3, 0.7]}, "a*b": {"ids": ["b", "a"], "merge_strategy": "product"}}
WORN: dict[str, tuple[list[str], list[float] | None]] = {
    "base": ([], None),
    "a": (["a"], None),
    SUM: (["a", "b"], [0.7, 0.3]),
    "a*b": (["a", "b"], None),
}
REFUSED = [
    ({"model": "nobody"}, 404),
    ({"model": "a*nobody"}, 404),
    ({"model": "mix:a*much"}, 400),
    ({"model": "mix:a*1e38"}, 400),
    ({"model": "base", "merged_adapters": {"ids": ["nobody"]}}, 404),
    ({"model": "base", "merged_adapters": {"ids": []}}, 400),
    ({"model": "base", "merged_adapters": 7}, 400),
    ({"model": "a", "merged_adapters": {"ids": ["b"]}}, 400),
    ({"model": "a*b", "merged_adapters": {"ids": ["a"]}}, 400),
    ({"model": "A" * 5000}, 404),
    ({"model": "/usr/lib/x " + "A" * 5000}, 404),
    ({"model": ["A" * 5000]}, 400),
    ({"model": int("1" * 150)}, 400),
    ({"model": "base", "merged_adapters": {"ids": ["A" * 5000]}}, 404),
]
CHAT = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": TOKENS, "temperature": 0}
COMPLETION = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
IDS = {"token_ids": [79, 110, 99, 101], "sampling_params": {"max_tokens": TOKENS, "temperature": 0}}


class Door(NamedTuple):
    """An endpoint: where it is, what is asked, and what of its answer is compared; None where no adapter changes it."""

    path: str
    body: dict[str, Any]
    answer: Callable[[Any], Any] | None = None


GENERATING = [
    Door(
        "/v1/completions", {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}, lambda x: x["choices"][0]["text"]
    ),
    Door("/v1/chat/completions", CHAT, lambda x: x["choices"][0]["message"]["content"]),
    Door(
        "/v1/chat/completions/batch",
        {**CHAT, "messages": [CHAT["messages"]]},
        lambda x: x["choices"][0]["message"]["content"],
    ),
    Door("/v1/messages", CHAT, lambda x: x["content"][0]["text"]),
    Door(
        "/v1/responses",
        {"input": PROMPT, "max_output_tokens": TOKENS, "temperature": 0},
        lambda x: x["output"][0]["content"][0]["text"],
    ),
    Door("/invocations", CHAT, lambda x: x["choices"][0]["message"]["content"]),
    Door("/invocations", COMPLETION, lambda x: x["choices"][0]["text"]),
]
OTHERS = [
    Door("/inference/v1/generate", IDS, lambda x: x["choices"][0]["token_ids"]),
    Door("/generative_scoring", {"query": PROMPT, "items": [" x"], "label_token_ids": [87, 79]}, lambda x: x["data"]),
    Door("/v1/messages/count_tokens", {"messages": CHAT["messages"]}),
    Door("/tokenize", {"prompt": PROMPT}),
    Door("/detokenize", {"tokens": [1, 2]}),
    Door("/v1/completions/render", {"prompt": PROMPT}),
    Door("/v1/chat/completions/render", CHAT),
    Door("/v1/messages/render", CHAT),
    Door("/v1/responses/render", {"input": PROMPT}),
]
POOLING = [
    Door("/v1/embeddings", {"input": PROMPT}, lambda x: x["data"][0]["embedding"]),
    Door("/v2/embed", {"texts": [PROMPT], "embedding_types": ["float"]}, lambda x: x["embeddings"]["float"][0]),
    Door("/pooling", {"input": PROMPT, "task": "embed"}, lambda x: x["data"][0]["data"]),
    Door("/invocations", {"input": PROMPT}, lambda x: x["data"][0]["embedding"]),
]
SCORING = [
    Door("/score", {"text_1": PROMPT, "text_2": "x"}, lambda x: x["data"][0]["score"]),
    Door("/v1/score", {"text_1": PROMPT, "text_2": "x"}, lambda x: x["data"][0]["score"]),
    Door("/rerank", {"query": PROMPT, "documents": ["x"]}, lambda x: x["results"][0]["relevance_score"]),
    Door("/v1/rerank", {"query": PROMPT, "documents": ["x"]}, lambda x: x["results"][0]["relevance_score"]),
    Door("/v2/rerank", {"query": PROMPT, "documents": ["x"]}, lambda x: x["results"][0]["relevance_score"]),
    Door("/tokenize", {"prompt": PROMPT}),
]
AUDIO = {"/v1/audio/transcriptions", "/v1/audio/translations"}
"""Of models that take speech, of which there is none here; their requests are forms (test_bodies.py)."""
DERENDER = {"/v1/chat/completions/derender", "/v1/completions/derender"}
"""They are given tokens, and only repeat the name."""
WITHOUT_MODEL = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/systemone", "/scale_elastic_ep"}
WITHOUT_MODEL |= {"/is_scaling_elastic_ep", "/ping", "/adapters", "/adapters/{adapter_name}"}
WITHOUT_MODEL |= {"/v1/responses/{response_id}/cancel", "/inference/v1/abort_requests"}


def post(server: Server, door: Door, **more: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{door.path}", json={**door.body, **more}, timeout=300)


def named(door: Door) -> str:
    return f"{door.path}-{next(iter(door.body))}"


def answers(server: Server, door: Door) -> dict[str, list[Any]]:
    """What an endpoint answers, by what is worn: by name, and as merged_adapters too."""
    found: dict[str, list[Any]] = {}
    for name in WORN:
        asked: list[dict[str, Any]] = [{"model": name}]
        if name in BODIES:
            asked += [{"model": "base", "merged_adapters": BODIES[name]}, {"merged_adapters": BODIES[name]}]
        if door.path in ("/v1/messages", "/v1/messages/render", "/v1/messages/count_tokens", "/v2/embed"):
            asked = [body for body in asked if "model" in body]  # which they want
        for body in asked:
            response = post(server, door, **body)
            assert response.status_code == 200, (body, response.text)
            found.setdefault(name, []).append(response.json() if door.answer is None else door.answer(response.json()))
    return found


@pytest.fixture(scope="module")
def pooling(small_truth: Truth, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    modules = [f"{name}={small_truth.folder / name}" for name in ("a", "b")]
    options = [*SMALL, "--runner", "pooling", "--convert", "embed", "--lora-modules", *modules]
    made = Server(small_truth.model, options, tmp_path_factory.mktemp("pooling"))
    made.start()
    made.wait()
    yield made
    made.kill()


@pytest.fixture(scope="module")
def texts(small_server: Server, small_truth: Truth) -> dict[str, str]:
    """What the completions endpoint answers, by what is worn; its tokens are PEFT's."""
    found = {}
    door = GENERATING[0]
    for name, (adapters, weights) in WORN.items():
        response = post(small_server, door, model=name, max_tokens=12, return_token_ids=True, ignore_eos=True)
        choice = response.json()["choices"][0]
        prompts = torch.tensor([choice["prompt_token_ids"]])
        tokens = [choice["token_ids"]]
        assert tokens == small_truth.greedy(tokens, *adapters, weights=weights, prompts=prompts), name
        found[name] = post(small_server, door, model=name).json()["choices"][0]["text"]
        assert choice["text"].startswith(found[name].rstrip("\ufffd"))
    assert len(set(found.values())) == len(WORN)
    return found


@pytest.mark.parametrize("door", GENERATING, ids=named)
def test_all_generate_the_same(small_server, texts, door) -> None:
    for name, found in answers(small_server, door).items():
        assert set(found) == {texts[name]}, name


@pytest.mark.parametrize("door", OTHERS, ids=named)
def test_others_wear_the_same(small_server, door) -> None:
    found = answers(small_server, door)
    if door.path.endswith("/render"):
        told = {name: [(x[0] if isinstance(x, list) else x)["model"] for x in each] for name, each in found.items()}
        for name, names in told.items():  # what is rendered goes on with the mix to where it is generated
            assert len(set(names) - {name, "mix:b*0.3+a*0.7", "b*a"}) == 0, names
    elif door.answer is None:
        assert len({json.dumps(each) for several in found.values() for each in several}) == 1
    else:
        assert all(each == several[0] for several in found.values() for each in several)
        assert len({json.dumps(several[0]) for several in found.values()}) == len(WORN)


def test_what_is_rendered_is_generated_as_it_was_asked(small_server, texts) -> None:
    rendered = post(small_server, Door("/v1/completions/render", {}), prompt=PROMPT, merged_adapters=BODIES[SUM])
    body = {**rendered.json()[0], **{"sampling_params": IDS["sampling_params"]}}
    done = post(small_server, Door("/inference/v1/generate", body)).json()
    tokens = done["choices"][0]["token_ids"]
    text = post(small_server, Door("/detokenize", {"tokens": tokens}), model="base").json()["prompt"]
    assert text == texts[SUM]


@pytest.mark.parametrize("door", [*GENERATING, *OTHERS], ids=named)
def test_what_is_not_served_is_refused(small_server, door) -> None:
    check_refused(small_server, door)


@pytest.mark.parametrize("door", [*POOLING, *SCORING], ids=named)
def test_what_is_not_served_is_refused_by_pooling(pooling, door) -> None:
    check_refused(pooling, door)


def check_refused(server: Server, door: Door) -> None:
    for asked, status in REFUSED:
        response = post(server, door, **asked)
        assert response.status_code == status, (asked, response.text)
        # 80 characters at a time: pydantic says it once for each form that a body may have, such as /tokenize's two.
        assert all(len(told) <= 81 for told in re.findall("A+|1+", response.text)), response.text
    assert server.is_up()


@pytest.mark.parametrize("door", POOLING, ids=named)
def test_pooling_wears_mixes(pooling, small_truth, door) -> None:
    ids = torch.tensor([post(pooling, SCORING[-1], model="base").json()["tokens"]])
    found = answers(pooling, door)
    for name, (adapters, weights) in WORN.items():
        right = hidden(small_truth, ids, adapters, weights)
        for each in found[name]:
            torch.testing.assert_close(torch.tensor(each), right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("door", SCORING, ids=named)
def test_scores_wear_mixes(pooling, door) -> None:
    found = answers(pooling, door)
    assert all(each == several[0] for several in found.values() for each in several)
    assert len({json.dumps(several[0]) for several in found.values()}) == (1 if door.answer is None else len(WORN))


@torch.no_grad()
def hidden(truth: Truth, ids: torch.Tensor, adapters: list[str], weights: list[float] | None) -> torch.Tensor:
    """The last token's last hidden state, of length 1."""
    truth.greedy([[0] * 12], *adapters, weights=weights, prompts=ids)  # wears them from now on
    if adapters:
        state = truth.base.model(ids).last_hidden_state
    else:
        with truth.peft.disable_adapter():
            state = truth.base.model(ids).last_hidden_state
    return torch.nn.functional.normalize(state[0, -1], dim=0)


@pytest.mark.parametrize("kind", ["small_server", "pooling"])
def test_there_is_no_other_door(kind, request) -> None:
    """A new endpoint of vLLM's has to be looked at here, and in the table of docs/serving.md."""
    server = request.getfixturevalue(kind)
    paths = httpx.get(f"{server.url}/openapi.json", timeout=60).json()["paths"]
    posts = {path for path, methods in paths.items() if "post" in methods}
    known = {door.path for door in (*GENERATING, *OTHERS, *POOLING, *SCORING)} | AUDIO | DERENDER | WITHOUT_MODEL
    assert posts <= known, posts - known


def test_streams_choices_logprobs_beams_and_lists_wear_what_was_asked(small_server, small_truth) -> None:
    prompt = small_truth.prompts[0].tolist()
    others = [small_truth.prompts[1].tolist(), prompt]

    async def run(name: str, **extra: Any) -> None:
        async with client(small_server) as api:
            tokens = await ask(api, name, prompt, **extra)
            adapters, weights = WORN[name]
            first = small_truth.prompts[:1]
            assert [tokens] == small_truth.greedy([tokens], *adapters, weights=weights, prompts=first)
            body = {"return_token_ids": True, "ignore_eos": True}
            told: dict[str, Any] = dict(model=name, prompt=prompt, max_tokens=12, temperature=0)
            streamed = []
            async for part in await api.completions.create(**told, stream=True, extra_body=body):
                streamed += part.choices[0].model_extra["token_ids"] or []
            assert streamed == tokens
            likeliest = {**told, "temperature": 1, "extra_body": {**body, "top_k": 1}}  # greedy is for one only
            several = await api.completions.create(**likeliest, n=3, logprobs=2)
            assert [choice.model_extra["token_ids"] for choice in several.choices] == [tokens] * 3
            listed = await api.completions.create(**{**told, "prompt": others}, extra_body=body)
            rows = [choice.model_extra["token_ids"] for choice in listed.choices]
            assert rows[1] == tokens
            second = small_truth.prompts[1:]
            assert rows[:1] == small_truth.greedy(rows[:1], *adapters, weights=weights, prompts=second)
            # Of one beam, a search is greedy.
            beams = await api.completions.create(**told, extra_body={**body, "use_beam_search": True})
            assert beams.choices[0].text == several.choices[0].text

    for name in WORN:
        asyncio.run(run(name))


def test_turns_of_a_conversation_wear_what_each_names(small_server, small_truth) -> None:
    """What a response goes on from is its words: each turn wears what it names."""
    door = Door("/v1/responses", {"max_output_tokens": TOKENS, "temperature": 0})
    answer = GENERATING[4].answer
    assert answer is not None
    for name in ("a", SUM):
        first = post(small_server, door, model=name, input=PROMPT).json()
        assert first["model"] == name
        second = {
            worn: post(small_server, door, model=worn, input=" and", previous_response_id=first["id"]).json()
            for worn in (name, "base")
        }
        whole = f"{PROMPT}{answer(first)} and"
        for worn, response in second.items():
            said = post(small_server, GENERATING[0], model=worn, prompt=whole).json()["choices"][0]["text"]
            assert answer(response) == said
        assert answer(second[name]) != answer(second["base"])


def test_a_header_cannot_take_the_place_of_a_mix(small_server) -> None:
    """SageMaker's header names an adapter; beside merged_adapters that is refused."""
    body = {**GENERATING[5].body, "model": "base"}
    headers = {"X-Amzn-SageMaker-Adapter-Identifier": "a"}
    url = f"{small_server.url}/invocations"
    alone = httpx.post(url, json=body, headers=headers, timeout=60)
    assert alone.json()["model"] == "a"
    both = httpx.post(url, json={**body, "merged_adapters": BODIES[SUM]}, headers=headers, timeout=60)
    assert both.status_code == 400 and "merged_adapters" in both.text


def test_a_mix_of_what_is_gone_is_404(small_server, small_truth) -> None:
    load = {"lora_name": "leaves", "lora_path": str(small_truth.folder / "b")}
    assert httpx.post(f"{small_server.url}/v1/load_lora_adapter", json=load, timeout=60).status_code == 200
    say(small_server, "leaves*a", small_truth.prompts[0].tolist())
    done = httpx.post(f"{small_server.url}/v1/unload_lora_adapter", json={"lora_name": "leaves"}, timeout=60)
    assert done.status_code == 200
    for name in ("leaves", "leaves*a"):
        assert post(small_server, GENERATING[0], model=name).status_code == 404
