"""How much memory registered adapters take: never more than was asked for."""

from __future__ import annotations

import random

import pytest
from registering import NAMES, ROW, check, held
from tiny import tiny_model

import ia3rt


def test_memory_is_never_more_than_was_asked_for(folder, truth):
    runtime = ia3rt.patch(tiny_model(), capacity=f"{4 * ROW + 5}B", grow=False, host_memory=2 * ROW + 5)
    runtime.register(folder)
    table, address = runtime._bank.table, runtime._bank.table.data_ptr()
    random.seed(0)
    for _ in range(40):
        check(runtime, truth, random.choices([*NAMES[:3], None], k=4) if random.random() < 0.5 else [*"def", None])
        stats = runtime.stats()
        assert held(runtime) == stats.host_bytes <= 2 * ROW
        assert stats.device_bytes == table.untyped_storage().nbytes() == 4 * ROW
        assert runtime._bank.table is table and table.data_ptr() == address
        assert stats.resident <= stats.rows == 3 and stats.registered == 6
    assert runtime.stats().host_evictions > 0 and runtime.stats().disk_loads > 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capacity": "1MBB"}, "capacity is '1MBB': give bytes, or text"),
        ({"capacity": "1KB"}, "has no room for an adapter: one takes"),
        ({"host_memory": -1}, "host_memory is -1"),
        ({"capacity": 0}, "at least 1 adapter"),
        ({"capacity": 1.5}, "capacity is 1.5: give a number of adapters, or text"),
        ({"capacity": None}, "capacity is None: give a number of adapters, or text"),
    ],
)
def test_what_is_no_capacity_is_refused(settings, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        ia3rt.patch(model, **settings)
    ia3rt.patch(model)


@pytest.mark.parametrize(("size", "given"), [("100KB", 100_000), ("100KiB", 102_400), ("0.1 MB", 100_000)])
def test_a_capacity_in_bytes(size, given):
    stats = ia3rt.patch(tiny_model(), capacity=size, grow=False).stats()
    assert stats.rows == given // ROW - 1 and given - ROW < stats.device_bytes <= given


def test_a_bank_that_grows_has_room_for_more_than_are_free(folder, truth):
    runtime = ia3rt.patch(tiny_model(), capacity=2)
    runtime.register(folder)
    runtime.set_adapter("a")
    check(runtime, truth, ["b", "c", "d", None])  # one row is free, and three are wanted
    assert runtime.stats().rows == 5 and runtime.stats().resident == 4
    check(runtime, truth, ["a", "e", "b", None])
