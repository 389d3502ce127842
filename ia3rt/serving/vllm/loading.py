"""Reads adapters apart from the server's loop: in a few threads, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

AT_ONCE = 4
"""Loads that read at the same time; the others wait for one of them, within their time."""
SECONDS = 60.0
"""How long a load may wait and read: a disk that does not answer, or a Hub, keeps no client for longer."""
_T = TypeVar("_T")
_POOL = ThreadPoolExecutor(AT_ONCE, "ia3rt-load")


class SlowLoadError(OSError):
    """A load took too long."""


async def apart(work: Callable[..., _T], *arguments: Any) -> _T:
    """Runs what reads or writes an adapter's files in one of the threads.

    Raises:
        SlowLoadError: it took longer than SECONDS, with the wait for a thread. It is not gone on with where it waited;
            where it reads, its result is dropped.
    """
    running = asyncio.get_running_loop().run_in_executor(_POOL, work, *arguments)
    try:
        return await asyncio.wait_for(running, SECONDS)
    except asyncio.TimeoutError as error:
        raise SlowLoadError(
            f"the adapter could not be read within {SECONDS:.0f} s, or {AT_ONCE} others that are being read took that "
            "long: look at the disk that it is on, and try again"
        ) from error
