"""vLLM's key, asked for at every door. vLLM itself asks under /v1 and the like, and lets anybody in by the others:
/invocations answers as /v1 does, and /adapters loads and unloads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.entrypoints.serve.middleware import authenticate

OPEN = frozenset({"/health", "/ping", "/metrics", "/version"})
"""What says how the server is, to load balancers and Prometheus, which have no key."""


def install() -> None:
    """Makes vLLM's middleware ask everywhere but at the open doors. Without a key there is no such middleware."""
    authenticate.GUARDED_PREFIX = ("",)
    middleware = authenticate.AuthenticationMiddleware
    middleware.__call__ = _call(middleware.__call__)


def _call(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, scope: Any, receive: Any, send: Any) -> Any:
        """Lets a request pass, or answers it with 401."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        return self.app(scope, receive, send) if path in OPEN else original(self, scope, receive, send)

    return call
