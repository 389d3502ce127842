"""What became of registered adapters, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TierStats:
    """What became of the adapters that were registered.

    Attributes:
        registered: how many names are known, without those that functions know.
        resident: how many adapters are in the bank, with loaded ones.
        pinned: how many of them may not be evicted.
        rows: the bank's, without the identity's.
        hits: how often an adapter was wanted that was resident.
        misses: how often one was not: `host_loads` and `disk_loads` together.
        host_loads: how often it was in the host's memory.
        disk_loads: how often it was read from its files.
        evictions: how many went from the bank.
        host_evictions: how many went from the host's memory.
        changed: how often files were other ones than those that had been read.
        device_bytes: what the bank takes, on all devices together.
        host_bytes: what rows in the host's memory take.
        load_seconds: the time in which adapters were copied into the bank, all together.
        read_seconds: the time in which files were read, all together.
    """

    registered: int
    resident: int
    pinned: int
    rows: int
    hits: int
    misses: int
    host_loads: int
    disk_loads: int
    evictions: int
    host_evictions: int
    changed: int
    device_bytes: int
    host_bytes: int
    load_seconds: float
    read_seconds: float
