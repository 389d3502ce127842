"""Registered adapters that something is about to wear, held until it does."""

from __future__ import annotations

from dataclasses import dataclass, field

from ia3rt.adapters.adapter import Adapter
from ia3rt.adapters.host import HostRow


@dataclass(eq=False, slots=True)
class Fetched:
    """Adapters that are wanted: it holds them.

    Attributes:
        adapters: those that are resident, by name.
        rows: the rows that others are to have, by name.
        looked: when their files were looked at, by name.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    rows: dict[str, HostRow] = field(default_factory=dict)
    looked: dict[str, float] = field(default_factory=dict)


NOTHING = Fetched()
