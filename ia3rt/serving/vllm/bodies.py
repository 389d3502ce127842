"""`merged_adapters` of a request's body, at whichever endpoint: taken where vLLM looks for the model, or refused.

Many of vLLM's request classes drop fields that they do not know, and others are made from them; a mix that is lost on
the way would be answered as the base model. So the body is read in front of all endpoints, and what is answered
without anybody having taken the field is not sent.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse
from vllm.entrypoints.launchers import app as vllm_app
from vllm.entrypoints.serve import create_error_response

from ia3rt.serving.vllm.merged_adapters import FIELD
from ia3rt.serving.vllm.names import short

_Receive = Callable[[], Awaitable[Any]]
_Send = Callable[[Any], Awaitable[None]]
_FORMS = (b"multipart/form-data", b"application/x-www-form-urlencoded")
_POLICY_VIOLATION = 1008


class _Body:
    """A request's body, and whether its field was taken."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.given = _field(content)
        self.is_taken = False


_body: ContextVar[_Body | None] = ContextVar("_body", default=None)


def install() -> None:
    """Has vLLM put the middleware of this file into every application that it builds, behind its own."""
    vllm_app.init_entrypoints_middleware = _init_middleware(vllm_app.init_entrypoints_middleware)


def take(request: Any) -> object:
    """What `merged_adapters` holds of the body that a request was made from; None where there is no such field.

    Args:
        request: vLLM's. One that came by no JSON body, such as a form or a line of a batch, has the field itself.
    """
    body = _body.get()
    if body is None:
        return (getattr(request, "model_extra", None) or {}).get(FIELD)
    body.is_taken = True
    return body.given


def named_model() -> object:
    """What the request's body has as `model`, for where that was lost: /invocations takes it from a header alone."""
    body = _body.get()
    return None if body is None else _parsed(body.content).get("model")


class BodyMiddleware:
    """Reads the field, and refuses where it was not taken.

    Args:
        app: the ASGI application behind it.
    """

    def __init__(self, app: Callable[[Any, _Receive, _Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: _Receive, send: _Send) -> None:
        """Answers a request."""
        if scope["type"] == "websocket":
            await self._app(scope, _without_field(receive, send), send)
        elif scope["type"] == "http" and not _is_form(scope):
            await self._answer(scope, receive, send)
        else:  # a form becomes an object with all of its fields
            await self._app(scope, receive, send)

    async def _answer(self, scope: Any, receive: _Receive, send: _Send) -> None:
        messages = await _received(receive)
        body = _Body(b"".join(message.get("body", b"") for message in messages))
        if body.given is not None:
            send = _unless_lost(body, scope, receive, send)
        token = _body.set(body)
        try:
            await self._app(scope, _again(messages, receive), send)
        finally:
            _body.reset(token)


def _init_middleware(original: Callable[..., None]) -> Callable[..., None]:
    def init_entrypoints_middleware(args: Any, app: FastAPI, supported_tasks: Any) -> None:
        """Middleware that is added first is the innermost: who has no key has his body not read."""
        app.add_middleware(BodyMiddleware)
        original(args, app, supported_tasks)

    return init_entrypoints_middleware


def _is_form(scope: Any) -> bool:
    types = [value for name, value in scope["headers"] if name == b"content-type"]
    return any(kind.strip().lower().startswith(_FORMS) for kind in types)


async def _received(receive: _Receive) -> deque[Any]:
    """The messages that a request's body comes in."""
    messages: deque[Any] = deque()
    while True:
        messages.append(await receive())
        if messages[-1]["type"] != "http.request" or not messages[-1].get("more_body", False):
            return messages


def _again(messages: deque[Any], receive: _Receive) -> _Receive:
    async def again() -> Any:
        """The messages that were received, and then what comes."""
        return messages.popleft() if messages else await receive()

    return again


def _field(body: bytes | str) -> object:
    """What a JSON body's field holds, or None: it has none, or is no object, which vLLM says."""
    # Another way to write the name is by \u…, or in UTF-16, where every other byte is 0.
    text = body.encode(errors="surrogatepass") if isinstance(body, str) else body
    if FIELD.encode() not in text and b"\\u" not in text and b"\0" not in text:
        return None
    return _parsed(body).get(FIELD)


def _parsed(body: bytes | str) -> dict[str, Any]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return given if isinstance(given, dict) else {}


def _unless_lost(body: _Body, scope: Any, receive: _Receive, send: _Send) -> _Send:
    refused = False

    async def checked(message: Any) -> None:
        """Sends what the application answers, unless it is a success that nobody took the field for."""
        nonlocal refused
        if message["type"] == "http.response.start" and message["status"] < 400 and not body.is_taken:
            refused = True
            says = f"{FIELD} means nothing at {short(scope['path'])}: name the mix as the model where one is taken."
            answer = create_error_response(says, param=FIELD)
            await JSONResponse(answer.model_dump(), answer.error.code)(scope, receive, send)
        if not refused:
            await send(message)

    return checked


def _without_field(receive: _Receive, send: _Send) -> _Receive:
    async def watched() -> Any:
        """What a client says by a WebSocket, which is closed where it says the field."""
        message = await receive()
        said = message.get("text") or message.get("bytes") or ""
        if message["type"] == "websocket.receive" and _field(said) is not None:
            reason = f"{FIELD} means nothing here"
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": reason})
            return {"type": "websocket.disconnect", "code": _POLICY_VIOLATION, "reason": reason}
        return message

    return watched
