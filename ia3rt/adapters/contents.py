"""What an adapter consists of, apart from any model or bank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ia3rt.adapters.site import SiteKey


class Vectors(dict[SiteKey, Tensor]):
    """Vectors [width] by (path, side); `vectors[path]` finds the one of a module that has one.

    Those of experts are [experts, width], or [width] where all of them share one.
    """

    def __missing__(self, path: object) -> Tensor:
        """The only vector at a module's path.

        Raises:
            KeyError: there is none, or there is one at each side.
        """
        here = [key for key in self if key[0] == path]
        if len(here) != 1:
            raise KeyError(path if not here else f"{path!r} has two vectors: use {here[0]} or {here[1]}")
        return self[here[0]]


@dataclass(frozen=True)
class AdapterContents:
    """An adapter's numbers and what came with them; a copy, which follows no change.

    Attributes:
        name: what it is called.
        vectors: as there, detached, in the bank's dtype and on its device.
        config: the adapter_config.json it came with, or what `add_adapter` was given.
        modules: the tensors of the modules that it has its own of, by path, then by name in the module.
    """

    name: str
    vectors: Vectors
    config: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
