"""Where adapters come from: a line of the log for each that is loaded or refused, and the root that /v1/models shows.

The engine reads an adapter from its stored copy, whose path says nothing to who operates the server.
"""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from ia3rt.serving.access import MOST_PATH, shown
from ia3rt.serving.vllm.requests import public_name

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is under its own name
resolved: ContextVar[tuple[str, Path, int, float] | None] = ContextVar("ia3_resolved", default=None)
"""What a resolver found last in this task: `Origins.loaded` takes it, with the name."""
_DIGEST = 19
"""Characters of a stored copy's name that tell it from others: "sha256-" and twelve."""


class Origins:
    """The folders, or ids on the Hub, that the loaded IA³ adapters were read from, by their names."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def loaded(self, name: str, origin: str, copy: Path, vectors: int, seconds: float) -> None:
        """Keeps, and logs, where an adapter comes from.

        Args:
            name: what users call it.
            origin: as whoever loaded it has said.
            copy: its folder in the store.
            vectors: how many it has.
            seconds: what reading and checking it took.
        """
        self._known[name] = origin
        digest = copy.name[:_DIGEST]
        logger.info(
            "Loaded IA³ adapter %s from %s: %s, %d vectors, %.2f s",
            shown(name),
            shown(origin, MOST_PATH),
            digest,
            vectors,
            seconds,
        )

    def unloaded(self, name: str) -> None:
        """Forgets an adapter."""
        self._known.pop(name, None)

    def show(self, card: Any, is_stored: bool) -> None:
        """Makes a card of /v1/models say what users call an adapter, and where it comes from, as a LoRA's does."""
        card.id = public_name(card.id)
        if is_stored:
            card.root = self._known.get(card.id, card.root)


def log_refusal(name: object, origin: object, answer: Any) -> None:
    """Logs that an adapter was not loaded, and what its client was told."""
    logger.warning(
        "Adapter %s from %s is not loaded: %s (%d)",
        shown(str(name)),
        shown(str(origin)),
        shown(answer.error.message, 1_000)[1:-1],
        answer.error.code,
    )
