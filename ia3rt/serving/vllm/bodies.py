"""`merged_adapters` of a request's body, at whichever endpoint: taken where vLLM looks for the model, or refused.

Many of vLLM's request classes drop fields that they do not know, and others are made from them; a mix that is lost on
the way would be answered as the base model. So the body is read in front of all endpoints, and what is answered
without anybody having taken the field is not sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse
from vllm.entrypoints.launchers import app as vllm_app
from vllm.entrypoints.serve import create_error_response

from ia3rt.adapters.shortened import short
from ia3rt.serving.vllm.merged_adapters import FIELD

_Receive = Callable[[], Awaitable[Any]]
_Send = Callable[[Any], Awaitable[None]]
_FORMS = (b"multipart/form-data", b"application/x-www-form-urlencoded")
_POLICY_VIOLATION = 1008
_KEY = re.compile("".join(f"(?:{letter}|\\\\u00(?i:{ord(letter):02x}))" for letter in FIELD))
"""The field's name, each letter written in any of JSON's ways: what has it is parsed, once more than vLLM does it."""


class _Body:
    """A request's body, as far as the application has read it, and whether its field was taken."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.content = b""
        self.given: object = None
        self.is_taken = False

    def passes(self, message: Any) -> Any:
        """Keeps a part of the body on its way to the application."""
        if message["type"] == "http.request":
            self._parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                self.content = b"".join(self._parts)
                self._parts.clear()
                self.given = _field(self.content)
        return message


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
        body = _Body()

        async def read() -> Any:
            """What the application reads, and no more: not of who has no key, and not where no body is wanted."""
            return body.passes(await receive())

        token = _body.set(body)
        try:
            await self._app(scope, read, _unless_lost(body, scope, receive, send))
        finally:
            _body.reset(token)


def _init_middleware(original: Callable[..., None]) -> Callable[..., None]:
    def init_entrypoints_middleware(args: Any, app: FastAPI, supported_tasks: Any) -> None:
        """Middleware that is added first is the innermost, behind the one that asks for the key."""
        app.add_middleware(BodyMiddleware)
        original(args, app, supported_tasks)

    return init_entrypoints_middleware


def _is_form(scope: Any) -> bool:
    """By the first of several headers, as FastAPI has it."""
    types = (value for name, value in scope["headers"] if name == b"content-type")
    return next(types, b"").strip().lower().startswith(_FORMS)


def _field(body: bytes | str) -> object:
    """What a JSON body's field holds, or None: it has none, or is no object, which vLLM says."""
    text = body if isinstance(body, str) else body.decode(json.detect_encoding(body), "replace")
    return _parsed(body).get(FIELD) if _KEY.search(text) else None


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
        if (
            message["type"] == "http.response.start"
            and message["status"] < 400
            and body.given is not None
            and not body.is_taken
        ):
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
