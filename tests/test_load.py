"""A Runtime under load: threads register, load, delete and route while others run forwards and generate.

Each row of each answer is compared with a float64 model that is scaled by hand. A request is answered rightly, or by an
error that says what was done to its adapter; memory stays what was asked for, and in the end no row is lost.
"""

from __future__ import annotations

import gc
import random
import statistics
import threading
import time
from pathlib import Path

import pytest
import torch
from load_traffic import FAULTS, KINDS, Traffic
from load_truth import TOTAL, Reference, by_site, write
from load_truth import Worn as Wanted
from tiny import scaled, tiny_model, token_ids

import ia3rt
from ia3rt.adapters.adapter import Adapter
from ia3rt.adapters.host import HostRow
from ia3rt.routing.worn import Worn

ROWS, HOST = 200, 500
ROW = 4 * TOTAL
REFUSED = ("unknown", "gone", "damaged", "no row")


def test_the_truth_is_that_of_scaled_weights() -> None:
    ids, scales = token_ids(rows=2), {}
    for path, first in by_site(3).items():
        combined = 0.5 * first.double() - 0.2 * by_site(4)[path].double()
        scales[path, "in" if path.endswith("down_proj") else "out"] = combined
    with torch.no_grad():
        expected = scaled(tiny_model(), scales)(ids).logits
    worn = Wanted((3, 4), "linear", (0.5, -0.2))
    torch.testing.assert_close(Reference().logits(ids, [worn, worn]), expected, rtol=1e-9, atol=1e-9)


def under_load(folder: Path, adapters: int, requests: int, seconds: float) -> Traffic:
    """Runs the load and checks all that there is to check."""
    names = [f"task{number}" for number in range(adapters)]
    for number, name in enumerate(names):
        write(folder / name, number)
    capacity = (ROWS + 1) * ROW
    runtime = ia3rt.patch(tiny_model(), capacity=f"{capacity}B", grow=False, host_memory=HOST * ROW)
    table, address = runtime._bank.table, runtime._bank.table.data_ptr()
    assert len(runtime.register(folder)) == adapters
    slow = slow_disk(runtime)
    traffic = Traffic(runtime, names, folder, ROWS)
    begun = time.monotonic()
    traffic.run(requests, seconds)
    took, counts = time.monotonic() - begun, traffic.counts
    stats = runtime.stats()
    print(f"{counts.requests:,} requests in {took:.0f} s, {counts.rows:,} rows compared; {counts}; {slow}; {stats}")

    assert not counts.wrong
    assert counts.right + sum(counts.refused[why] for why in REFUSED) == counts.requests, "each has its answer"
    for kind in KINDS:
        assert counts.asked[kind] > 0, kind
    for why in REFUSED:
        assert counts.refused[why] > 0, f"{why}: it was never met"
    assert all(counts.faults[fault] > 0 for fault in FAULTS) and slow["reads"] > 0
    assert stats.evictions > 0 and stats.host_evictions > 0 and stats.changed > 0 and stats.host_loads > 0

    assert runtime._bank.table is table and table.data_ptr() == address
    assert {device for _, _, device, _, _ in traffic.seen} == {capacity}
    assert max(host for *_, host, _ in traffic.seen) <= HOST * ROW
    assert max(resident for *_, resident in traffic.seen) <= ROWS
    check_rows(runtime)
    check_held(runtime, folder)
    check_flat(traffic)
    return traffic


def slow_disk(runtime: ia3rt.Runtime) -> dict[str, int]:
    """Makes a read in fifty take a while."""
    read, chance, slow = runtime._tiers._reader.read, random.Random(7), {"reads": 0}
    lock = threading.Lock()

    def slowly(name: str, *where: object) -> object:
        with lock:
            is_slow = chance.random() < 0.02
            slow["reads"] += is_slow
        if is_slow:
            time.sleep(0.2)
        return read(name, *where)

    runtime._tiers._reader.read = slowly  # type: ignore[method-assign]
    return slow


def check_rows(runtime: ia3rt.Runtime) -> None:
    """Once nobody wears anything, each row is free or one adapter's."""
    runtime.set_adapter(None)
    gc.collect()
    bank = runtime._bank
    rows = [adapter.row for adapter in (*bank.adapters.values(), *bank.adapters.complements.values())]
    assert sorted([*rows, *bank._free.rows]) == list(range(1, ROWS + 1))
    assert not bank.adapters.pinned & bank.adapters.evictable.keys()


def check_held(runtime: ia3rt.Runtime, folder: Path) -> None:
    """Nothing holds what is in neither tier and worn by nobody; one leak a request would be thousands."""
    bank, shelf = runtime._bank, runtime._routing._shelf
    alive = gc.get_objects()
    adapters = [each for each in alive if type(each) is Adapter and each.free is bank._free.rows]
    assert len(adapters) == len(bank.adapters) + len(bank.adapters.complements)
    assert sum(type(each) is HostRow and each.folder.is_relative_to(folder) for each in alive) <= HOST
    assert sum(type(each) is Worn and each.shelf is shelf for each in alive) < 20
    assert not runtime._tiers._reader._reading


def check_flat(traffic: Traffic) -> None:
    """The process takes no more in the last quarter than in the second one."""
    half = len(traffic.seen) // 2
    second, last = traffic.seen[half // 2 : half], traffic.seen[half + half // 2 :]
    before, after = (statistics.median(each[1] for each in part) for part in (second, last))
    print(f"resident memory: {before / 1e6:.1f} MB, then {after / 1e6:.1f} MB")
    assert after - before < 32e6


@pytest.mark.filterwarnings("ignore:adapter .* (was|is):UserWarning")
def test_a_minute_of_load(tmp_path: Path) -> None:
    under_load(tmp_path, 3_000, 10**5, seconds=40)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:adapter .* (was|is):UserWarning")
def test_a_hundred_thousand_requests(tmp_path: Path) -> None:
    traffic = under_load(tmp_path, 10_000, 10**5, seconds=7200)
    assert traffic.counts.requests >= 10**5
