"""ia3rt with registered adapters: as many as there may be, in a bank of one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

import ia3rt
from ia3rt.adapters.tier_stats import TierStats
from ia3rt.bench.contenders.ia3rt import Ia3rt
from ia3rt.bench.contenders.subject import LeftOut, Way
from ia3rt.bench.models import clone
from ia3rt.bench.workshop import Workshop

BANK = 64_000_000
"""Bytes of the bank."""
_MORE = 8
"""Names that take turns above what the bank has rows for: the one that was used least recently comes next."""


class Registered(Ia3rt):  # type: ignore[misc]
    """A patched model whose bank is full, unless fewer adapters are registered."""

    def __init__(self, workshop: Workshop, names: Sequence[str]) -> None:
        self._workshop, self._names = workshop, names
        rows = max(1, BANK // (4 * workshop.adapters.numbers) - 1)
        runtime = self._registered(rows, host_bytes=0)
        super().__init__(runtime.model, runtime)
        runtime.prefetch(list(dict.fromkeys((names[-1], *names[: rows - 1])))).result()

    def resident_bytes(self) -> int:
        """The bytes of the whole bank, and of what is in the host's memory."""
        told: TierStats = self._runtime.stats()
        return told.device_bytes + told.host_bytes

    def from_host(self) -> Way:
        """set_adapter of one that was evicted, and is in the host's memory."""
        return self._from(10 * BANK)

    def from_disk(self, folder: Path) -> Way:
        """set_adapter of one that was evicted, with no host memory to keep it in."""
        return self._from(0)

    def _from(self, host_bytes: int) -> Way:
        rows = min(max(1, BANK // (4 * self._workshop.adapters.numbers) - 1), len(self._names) // 2)
        if not rows:
            raise LeftOut("one adapter alone is never evicted")
        runtime = self._registered(rows, host_bytes)
        turns: Iterator[str] = cycle(self._names[: rows + min(rows, _MORE)])
        for _ in range(2 * rows + _MORE):  # each was read
            runtime.set_adapter(next(turns))
        hits = runtime.stats().hits

        def check() -> None:
            if runtime.stats().hits != hits:
                raise RuntimeError("an adapter that was to be brought in was there already")

        return Way(lambda _: runtime.set_adapter(next(turns)), after=check)

    def _registered(self, rows: int, host_bytes: int) -> ia3rt.Runtime:
        runtime = ia3rt.patch(clone(self._workshop.model), capacity=rows, grow=False, host_memory=host_bytes)
        runtime.register({name: self._workshop.adapters.own_folder(name) for name in self._names})
        return runtime


def subject(workshop: Workshop, names: Sequence[str]) -> Registered:
    """A patched model that knows these adapters."""
    return Registered(workshop, names)
