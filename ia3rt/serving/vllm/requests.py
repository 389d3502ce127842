"""The LoRARequests that stand for IA³ adapters and mixes.

vLLM tells adapters apart by number in its slots, by name in its sets and by name and path in its prefix cache. So equal
mixes of the same numbers have to have one request, and different ones never a name or a number in common: what a name
meant before it was loaded again goes on under another one, for the requests that still run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

from vllm.lora.request import LoRARequest

from ia3rt.adapters.mix import Mix
from ia3rt.serving.vllm.keeping import is_stored_path
from ia3rt.serving.vllm.names import canonical, spelled
from ia3rt.serving.vllm.source import Source

MOST = 10_000
"""Mixes and adapters that are remembered. One that was forgotten gets a new number, and a slot of its own."""
_FIRST_MIX = 1 << 20  # above vLLM's own numbers, below the 2**31 that its workers keep
_MARK = "@ia3:"


class Requests:
    """The requests of one API server.

    Args:
        next_number: gives an adapter's number, as vLLM gives a LoRA's.
        rank: this API server's, of
        count: the API servers, which number their mixes without knowing of each other.
    """

    def __init__(self, next_number: Callable[[], int], rank: int = 0, count: int = 1) -> None:
        self._next_number = next_number
        self._next_mix, self._step = _FIRST_MIX + max(rank, 0), max(count, 1)
        self._known: OrderedDict[tuple[str, str], LoRARequest] = OrderedDict()
        self._names: set[str] = set()

    def mix(self, mix: Mix, folders: Mapping[str, str | Path]) -> LoRARequest:
        """The request for a mix.

        Args:
            mix: of names; their order does not matter.
            folders: each adapter's folder, as `store` returned it.

        Raises:
            ValueError: the weights of one adapter add up to no number.
        """
        mix = canonical(mix)
        path = Source(mix, {name: str(folders[name]) for name in mix.adapters}).path()

        def made() -> LoRARequest:
            number, self._next_mix = self._next_mix, self._next_mix + self._step
            return LoRARequest(f"{spelled(mix)}{_MARK}{number}", number, path)

        return self._remembered((spelled(mix), path), made)

    def adapter(self, name: str, folder: Path) -> LoRARequest:
        """The request for one adapter.

        Args:
            name: what users call it; vLLM's metrics show it as it is, where it has meant nothing else before.
            folder: its folder, as `store` returned it.
        """

        def made() -> LoRARequest:
            number = self._next_number()
            shown = name if name not in self._names else f"{name}{_MARK}{number}"
            self._names.add(name)
            return LoRARequest(shown, number, str(folder))

        return self._remembered((name, str(folder)), made)

    def _remembered(self, key: tuple[str, str], made: Callable[[], LoRARequest]) -> LoRARequest:
        if key not in self._known:
            self._known[key] = made()
            if len(self._known) > MOST:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]


def public_name(name: str) -> str:
    """What users call the adapter or mix whose request has this name."""
    return name.rpartition(_MARK)[0] or name


def is_stored(request: LoRARequest) -> bool:
    """Whether a request is for one IA³ adapter that was stored here."""
    return is_stored_path(request.lora_path)


def kind(request: LoRARequest) -> str | None:
    """What a request wears: "adapter", a mix's combination type, or None where it is a LoRA."""
    if is_stored(request):
        return "adapter"
    mix = Source.mix_of(request.lora_path)
    return None if mix is None else mix.combination_type
