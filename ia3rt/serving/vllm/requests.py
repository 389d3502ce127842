"""The LoRARequests that stand for adapters and mixes.

vLLM tells adapters apart by number in its slots, by name in its sets and by name and path in its prefix cache. So equal
mixes of the same numbers have to have one request, and different ones never a name or a number in common: what a name
meant before it was loaded again, as IA³ or as a LoRA, goes on under another one, for the requests that still run.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from itertools import count as counting
from pathlib import Path

from vllm.lora.request import LoRARequest

from ia3rt.adapters.mix_text import canonical, spelled
from ia3rt.serving.vllm.adapter_numbers import MixNumbers
from ia3rt.serving.vllm.keeping import is_stored_path
from ia3rt.serving.vllm.source import Source

MOST = 10_000
"""Mixes and adapters that are remembered. One that was forgotten gets a new number, and a slot of its own."""
MOST_CHARACTERS = 1 << 24
"""What their names and paths may be together: those of a mix of 64 adapters are long."""
MOST_NAMES = 100_000
"""Names that the engine has as users have them. A later one is told from others by its number from the beginning."""
_NUMBERED = re.compile(r"(.*)#\d+", re.DOTALL)


class Requests:
    """The requests of one API server.

    Args:
        next_number: gives an adapter's number, as vLLM gives a LoRA's.
        rank: this API server's place among them, from 0 on.
        count: how many API servers there are; they number their mixes without knowing of each other.
    """

    def __init__(self, next_number: Callable[[], int], rank: int = 0, count: int = 1) -> None:
        self._next_number = next_number
        self._mix_numbers = MixNumbers(rank, count)
        self._serials = counting(max(rank, 0), max(count, 1))
        self._known: OrderedDict[tuple[str, str], LoRARequest] = OrderedDict()
        self._mixes: set[int] = set()
        self._characters = 0
        self._names: set[str] = set()

    def mix(self, source: Source, holds: str = "") -> LoRARequest:
        """The request for a mix.

        Args:
            source: the mix, of names in any order, and each adapter's folder, as `store` returned it.
            holds: of a folder that is not `store`'s, what tells its files from those that it had before.

        Raises:
            ValueError: the weights of one adapter add up to no number.
        """
        mix = canonical(source.mix)
        name, path = spelled(mix), Source(mix, source.folders).path()

        def made() -> LoRARequest:
            number = self._mix_numbers.take(self._mixes)
            self._mixes.add(number)
            return LoRARequest(self.numbered(name), number, path)

        return self._remembered((name, path + holds), made)

    def adapter(self, name: str, folder: Path) -> LoRARequest:
        """The request for one IA³ adapter.

        Args:
            name: what users call it.
            folder: its folder, as `store` returned it.
        """

        def made() -> LoRARequest:
            return LoRARequest(self.claimed(name), self._next_number(), str(folder))

        return self._remembered((name, str(folder)), made)

    def claimed(self, name: str) -> str:
        """A name for the engine that nothing else has had: the users' own, where that is one."""
        if name in self._names or len(self._names) >= MOST_NAMES or _NUMBERED.fullmatch(name):
            return self.numbered(name)
        self._names.add(name)
        return name

    def numbered(self, name: str) -> str:
        """A name for the engine that nothing else has had, from which `public_name` tells the users' own.

        No name that `claimed` leaves as it is ends like this one, so nobody can choose it.
        """
        return f"{name}#{next(self._serials)}"

    def _remembered(self, key: tuple[str, str], made: Callable[[], LoRARequest]) -> LoRARequest:
        if key not in self._known:
            self._known[key] = made()
            self._characters += len(key[0]) + len(key[1])
            while len(self._known) > MOST or (self._characters > MOST_CHARACTERS and len(self._known) > 1):
                (named, path), forgotten = self._known.popitem(last=False)
                self._characters -= len(named) + len(path)
                self._mixes.discard(forgotten.lora_int_id)
        self._known.move_to_end(key)
        return self._known[key]


def public_name(name: str) -> str:
    """What users call the adapter or mix whose request has this name."""
    numbered = _NUMBERED.fullmatch(name)
    return name if numbered is None else numbered[1]


def is_stored(request: LoRARequest) -> bool:
    """Whether a request is for one IA³ adapter that was stored here."""
    return is_stored_path(request.lora_path)


def kind(request: LoRARequest) -> str | None:
    """What a request wears: "adapter", a mix's combination type, or None where it is a LoRA."""
    if is_stored(request):
        return "adapter"
    mix = Source.mix_of(request.lora_path)
    return None if mix is None else mix.combination_type
