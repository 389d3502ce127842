"""What a client is told, and by which status, where an adapter is not loaded or cannot be read."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.exception_handling.utils import sanitize_message
from vllm.logger import init_logger

from ia3rt.adapters.shortened import short
from ia3rt.serving.access import MOST_PATH, ForbiddenPathError, shown
from ia3rt.serving.vllm.loading import SlowLoadError
from ia3rt.serving.vllm.sentences import named, sentence_of
from ia3rt.serving.vllm.store import DamagedCopyError, StoreError

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is under its own name
_STATUSES: tuple[tuple[type[Exception], HTTPStatus, str], ...] = (
    (ForbiddenPathError, HTTPStatus.FORBIDDEN, "ForbiddenError"),
    (FileNotFoundError, HTTPStatus.NOT_FOUND, "NotFoundError"),
    (SlowLoadError, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"),
    (DamagedCopyError, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"),
    (StoreError, HTTPStatus.INSUFFICIENT_STORAGE, "InternalServerError"),
)


def refusal(error: Exception, name: str, param: str | None = None) -> Any:
    """vLLM's ErrorResponse: what a client can mend is 4xx, and what an operator must is 5xx.

    Args:
        error: of any kind: the worker's come as vLLM wraps them.
        name: the adapter's, which the answer names: vLLM takes paths out of what clients are told.
        param: the field of the request that is to blame.
    """
    says = named(name, sentence_of(error))
    found = ((status, called) for kind, status, called in _STATUSES if isinstance(error, kind))
    status, called = next(found, (HTTPStatus.BAD_REQUEST, "BadRequestError"))
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("%s", shown(says, MOST_PATH)[1:-1])  # whole: vLLM takes the paths out of what clients are told
    return create_error_response(says, called, status, param)


def echoing_little(answer: Any, request: Any) -> Any:
    """An answer of vLLM's; an error does not repeat all of a long name or path."""
    if hasattr(answer, "error"):
        for part in ("model", "lora_name", "lora_path"):
            given = getattr(request, part, None)
            if isinstance(given, str) and given != short(given):
                for whole in (given, sanitize_message(given)):  # vLLM takes paths out of what it says
                    answer.error.message = answer.error.message.replace(whole, short(whole))
    return answer
