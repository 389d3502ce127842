"""What may go to the engine: adapters and mixes whose scales are not too large; mixes are composed by then."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextvars import ContextVar

from torch import Tensor
from vllm.logger import init_logger

from ia3rt.adapters.site import Site
from ia3rt.serving.vllm.composed_mixes import MOST_FILES, ComposedMixes
from ia3rt.serving.vllm.name_locks import NameLocks
from ia3rt.serving.vllm.read import Read
from ia3rt.serving.vllm.scale_check import checked_vectors
from ia3rt.serving.vllm.source import Source

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is under its own name
resolving: ContextVar[Admission | None] = ContextVar("ia3_resolving", default=None)
"""What a resolver's find has to pass; resolvers know nothing of the server that asks them."""
AT_ONCE = 2
"""Mixes that are composed at the same time, in threads beside the server's own, and so many loads; others wait."""
MOST_READ = 64 << 20
"""Bytes of adapters' vectors that stay read: to read 64 adapters takes longer than to compose them."""


class Admission:
    """One API server's.

    Args:
        limit: what |s| and each weight may be at most.
        composed: where composed mixes are kept.
    """

    def __init__(self, limit: float, composed: ComposedMixes) -> None:
        self._limit = limit
        self._composed = composed
        self._turns, self._loads = asyncio.Semaphore(AT_ONCE), asyncio.Semaphore(AT_ONCE)
        self._read = Read(MOST_READ)
        self._asked = NameLocks()
        self._admitted: OrderedDict[int, None] = OrderedDict()

    async def check_adapter(self, source: Source) -> int:
        """Reads one adapter, and counts its vectors.

        Raises:
            ValueError: a scale is beyond the limit, or the adapter is damaged.
            FileNotFoundError: it is not there.
        """
        async with self._loads:
            return len(await asyncio.to_thread(self._vectors, source))

    async def admit(self, source: Source) -> None:
        """Composes a mix, where that was not done yet.

        Raises:
            ValueError: a scale or a weight is beyond the limit, or the adapters have other widths at one site.
            FileNotFoundError: one of them is not there.
        """
        path = source.path()
        if self._holds(path):
            return
        async with self._asked[path]:
            if not self._holds(path):  # another request may have asked for it meanwhile
                async with self._turns:
                    vectors = await asyncio.to_thread(self._vectors, source)
                self._keep(path, vectors)

    def admit_now(self, source: Source) -> None:
        """As `admit`, at once: where an adapter was loaded again between `admit` and the request's start."""
        if not self._holds(source.path()):
            self._keep(source.path(), self._vectors(source))

    def _holds(self, path: str) -> bool:
        """Whether a mix is kept, and was checked here: a server with another limit may have kept it."""
        if hash(path) not in self._admitted or not self._composed.holds(path):
            return False
        self._admitted.move_to_end(hash(path))
        return True

    def _vectors(self, source: Source) -> dict[Site, Tensor]:
        return checked_vectors(source.bank(self._read), source.mix, self._limit)

    def _keep(self, path: str, vectors: dict[Site, Tensor]) -> None:
        self._admitted[hash(path)] = None
        if len(self._admitted) > MOST_FILES:
            self._admitted.popitem(last=False)
        try:
            self._composed.write(path, vectors)
        except OSError as error:  # as where the disk is full: the engine then composes the mix itself
            logger.warning("A composed mix could not be kept: %s", error)
