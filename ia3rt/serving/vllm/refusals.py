"""What a client is told, and by which status, where an adapter is not loaded or cannot be read."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

from vllm.entrypoints.serve import create_error_response

from ia3rt.serving.access import ForbiddenPathError, shown
from ia3rt.serving.vllm.loading import SlowLoadError
from ia3rt.serving.vllm.store import DamagedCopyError, StoreError

_STATUSES: tuple[tuple[type[Exception], HTTPStatus, str], ...] = (
    (ForbiddenPathError, HTTPStatus.FORBIDDEN, "ForbiddenError"),
    (FileNotFoundError, HTTPStatus.NOT_FOUND, "NotFoundError"),
    (SlowLoadError, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"),
    (DamagedCopyError, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"),
    (StoreError, HTTPStatus.INSUFFICIENT_STORAGE, "InternalServerError"),
)

_WRAPPED = re.compile(
    r"Worker failed with error (?P<quote>['\"])(?P<said>.+)(?P=quote), please check the stack trace above.*"
    r"|Call to \w+ method failed: (?P<called>.+)",
    re.DOTALL,
)


def refusal(error: Exception, name: str, param: str | None = None) -> Any:
    """vLLM's ErrorResponse: what a client can mend is 4xx, and what an operator must is 5xx.

    Args:
        error: of any kind: the worker's come as vLLM wraps them.
        name: the adapter's, which the answer names: vLLM takes paths out of what clients are told.
        param: the field of the request that is to blame.
    """
    found = ((status, called) for kind, status, called in _STATUSES if isinstance(error, kind))
    status, called = next(found, (HTTPStatus.BAD_REQUEST, "BadRequestError"))
    return create_error_response(named(name, _sentence(error)), called, status, param)


def named(name: str, says: str) -> str:
    """A sentence that names the adapter that it is about."""
    return says if repr(name) in says else f"adapter {shown(name)}: {says}"


def unwrapped(message: str) -> str:
    """What a worker said, without what vLLM puts around it on its way: the method, and to look for a stack trace."""
    while (wrapped := _WRAPPED.match(message)) is not None:
        message = wrapped["said"] or wrapped["called"]
    return message


def _sentence(error: Exception) -> str:
    """What went wrong, without the traceback that vLLM appends to a worker's error, and without half characters."""
    lines = unwrapped(str(error).strip()).splitlines()
    return lines[0].encode("utf-8", "backslashreplace").decode() if lines else type(error).__name__
