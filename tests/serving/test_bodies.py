"""`merged_adapters` of bodies, at endpoints that take it, drop it or are not there yet."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Annotated, Any

import httpx
import pytest
from fastapi import FastAPI, Form, Request, WebSocket
from fastapi.testclient import TestClient
from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.websockets import WebSocketDisconnect
from vllm.entrypoints.launchers import app as vllm_app
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest

from ia3rt.serving.vllm import bodies, register

MIX = {"ids": ["a"]}


class Small(BaseModel):
    """A request class that drops what it does not know, as Anthropic's does."""

    model: str | None = None


@pytest.fixture
def seen() -> list[Any]:
    """What the endpoints took."""
    return []


@pytest.fixture
def app(seen: list[Any]) -> FastAPI:
    register()
    made = FastAPI()

    @made.post("/taken")
    async def taken(request: Small) -> str:
        # vLLM's endpoints work in a task of their own.
        seen.append(await asyncio.create_task(asyncio.to_thread(bodies.take, request)))
        return "answered"

    @made.post("/streamed")
    async def streamed(request: Small) -> StreamingResponse:
        return StreamingResponse(iter(["answered", "as the base model"]))

    @made.post("/dropped")
    async def dropped(request: Request) -> Any:
        return await request.json()

    @made.post("/form")
    async def form(request: Annotated[TranscriptionRequest, Form()]) -> str:
        seen.append(bodies.take(request))
        return "answered"

    @made.websocket("/socket")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        while True:
            await websocket.send_text("answered " + await websocket.receive_text())

    args = SimpleNamespace(allowed_origins=["*"], allow_credentials=False, allowed_methods=["*"], allowed_headers=["*"])
    args.api_key, args.enable_request_id_headers, args.middleware = [], False, []
    args.log_error_stack = False
    made.state.args = args
    init_exception_handler(made)
    vllm_app.init_entrypoints_middleware(args, made, ("embed",))
    return made


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    return TestClient(app, raise_server_exceptions=False)


WAYS = {
    "plain": json.dumps({"merged_adapters": MIX}).encode(),
    "escaped": b'{"merged\\u005fadapters": {"ids": ["a"]}}',
    "utf-16": json.dumps({"merged_adapters": MIX}).encode("utf-16"),
    "utf-32": json.dumps({"merged_adapters": MIX}).encode("utf-32"),
    "twice": b'{"merged_adapters": null, "merged_adapters": {"ids": ["a"]}}',
    "long": json.dumps({"prompt": "x" * 10**6, "merged_adapters": MIX}).encode(),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_field_is_taken_however_it_is_written(client, seen, way) -> None:
    response = client.post("/taken", content=WAYS[way], headers={"Content-Type": "application/json"})
    assert response.json() == "answered" and seen == [MIX]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", ["/dropped", "/streamed"])
def test_what_nobody_took_is_not_answered(client, path, way) -> None:
    for kind in ("application/json", "application/json; charset=utf-8", "text/plain", ""):
        response = client.post(path, content=WAYS[way], headers={"Content-Type": kind} if kind else {})
        assert response.status_code >= 400, (kind, response.text)
        assert "answered" not in response.text
    error = client.post(path, content=WAYS[way], headers={"Content-Type": "application/json"}).json()["error"]
    assert error["code"] == 400 and error["param"] == "merged_adapters" and path in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[]",
        b"7",
        b'{"merged_adapters": null}',
        b'{"inner": {"merged_adapters": 1}}',
        b'{"x": "merged_adapters"}',
    ],
)
def test_other_bodies_are_as_they_were(client, seen, body) -> None:
    response = client.post("/dropped", content=body)
    assert response.status_code == 200 and response.json() == json.loads(body)
    assert client.post("/dropped", content=b"{").status_code >= 400  # the endpoint's own word


def test_requests_do_not_see_each_others(app) -> None:
    """At the same time, and one after another on one connection."""
    seen: dict[int, object] = {}

    @app.post("/waits")
    async def waits(request: Request) -> int:
        await request.json()
        number = int(request.headers["number"])
        await asyncio.sleep(0.01 * (number % 3))
        seen[number] = bodies.take(SimpleNamespace(model_extra=None))
        return number

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:

            async def one(number: int) -> None:
                body = {"merged_adapters": {"ids": [str(number)]}} if number % 2 else {}
                assert (await client.post("/waits", json=body, headers={"number": str(number)})).json() == number

            await asyncio.gather(*(one(number) for number in range(60)))

    asyncio.run(run())
    assert seen == {number: {"ids": [str(number)]} if number % 2 else None for number in range(60)}


def test_a_model_that_was_lost_is_found_again(app) -> None:
    serving = BaseServing(OpenAIModelRegistry(None, [BaseModelPath("base", "base")]), None)

    @app.post("/loses")
    async def loses(raw_request: Request) -> Any:
        await raw_request.json()
        request = CompletionRequest(prompt="x")
        refused = await serving._check_model(request)
        return request.model if refused is None else refused.error.code

    client = TestClient(app)
    told = [client.post("/loses", json=body).json() for body in ({"model": "base"}, {}, {"model": "x"}, {"model": [1]})]
    assert told == ["base", None, 404, 400]


def test_a_form_keeps_its_fields(client, seen) -> None:
    files = {"file": ("x.wav", b"sound")}
    response = client.post("/form", data={"model": "base", "merged_adapters": json.dumps(MIX)}, files=files)
    assert response.json() == "answered" and seen == [json.dumps(MIX)]


def test_the_first_of_several_content_types_counts(client, seen) -> None:
    kinds = [("Content-Type", "application/json"), ("Content-Type", "multipart/form-data; boundary=x")]
    assert client.post("/taken", content=WAYS["plain"], headers=kinds).json() == "answered" and seen == [MIX]
    assert client.post("/dropped", content=WAYS["plain"], headers=kinds).status_code == 400


@pytest.mark.parametrize(("method", "path"), [("POST", "/unread"), ("GET", "/unread"), ("OPTIONS", "/taken")])
def test_a_body_that_nobody_wants_is_not_read(app, method, path) -> None:
    @app.api_route("/unread", methods=["GET", "POST"])
    async def unread() -> str:
        return "answered"

    asked, sent = [], []

    async def receive() -> dict[str, Any]:
        asked.append(True)
        return {"type": "http.request", "body": WAYS["plain"], "more_body": len(asked) < 100}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b"", "app": app}
    asyncio.run(app(scope, receive, send))
    assert sent and len(asked) == 0


def test_a_websocket_is_closed(client) -> None:
    with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect("/socket") as socket:
        socket.send_text('{"type": "session.update", "model": "base"}')
        assert socket.receive_text().startswith("answered")
        socket.send_text(json.dumps({"type": "session.update", "model": "base", "merged_adapters": MIX}))
        socket.receive_text()
    assert closed.value.code == 1008 and "merged_adapters" in closed.value.reason


def test_a_server_that_only_renders_refuses_what_it_does_not_know() -> None:
    """vLLM's server without an engine has other models: no adapters, and no resolvers."""
    register()
    config = SimpleNamespace(max_model_len=8)
    serving = BaseServing(OpenAIModelRegistry(config, [BaseModelPath("base", "base")]), config)

    def check(**more: Any) -> int:
        refused = asyncio.run(serving._check_model(CompletionRequest(prompt="x", **more)))
        return 200 if refused is None else refused.error.code

    assert check(model="base") == check() == 200
    assert check(model="a") == check(model="a*b") == check(model="base", merged_adapters=MIX) == 404
    assert check(model="mix:") == check(model="base", merged_adapters=7) == 400
    request = CompletionRequest(prompt="x", model="base")
    assert serving._maybe_get_adapters(request) is None
