"""Threads that bring in, load and copy at once: all wear the right numbers, and nobody waits for another's disk."""

from __future__ import annotations

import copy
import random
import shutil
import threading
import time

import pytest
import torch
from registering import IDS, NAMES, ROW, check, held, patched, replace
from safetensors.torch import load_file, save_file
from tiny import logits, tiny_model
from where import home

import ia3rt
from ia3rt.adapters import registry, tiers
from ia3rt.routing import worn


@pytest.mark.parametrize(
    "want",
    [
        lambda runtime, folder: runtime.set_adapter("b"),
        lambda runtime, folder: runtime.route(["b", {"a": 0.5}]),
        lambda runtime, folder: runtime.pin("b"),
        lambda runtime, folder: runtime.prefetch("b").result(),
        lambda runtime, folder: runtime.get_adapter("b"),
        lambda runtime, folder: runtime.save_adapter("b", folder / "saved"),
        lambda runtime, folder: runtime.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum", "linear"),
        lambda runtime, folder: runtime.train_adapter("b"),
        lambda runtime, folder: runtime.merge_adapter("b"),
        lambda runtime, folder: runtime.merge_and_unload("b"),
        lambda runtime, folder: runtime.register(folder),
    ],
    ids=["set", "route", "pin", "prefetch", "get", "save", "combine", "train", "merge", "unload", "register"],
)
def test_a_slow_disk_stops_nobody_else(folder, truth, monkeypatch, want):
    runtime = patched(folder, rows=4)
    runtime.set_adapter("a")
    reads, goes_on, failed = threading.Event(), threading.Event(), []
    read, inside = runtime._tiers._reader.read, registry._inside

    def slow(*given: object) -> object:
        reads.set()
        assert goes_on.wait(10)
        return read(*given) if len(given) == 3 else inside(*given)

    def work() -> None:
        try:
            want(runtime, folder)
        except BaseException as error:
            failed.append(error)

    monkeypatch.setattr(runtime._tiers._reader, "read", slow)
    monkeypatch.setattr(registry, "_inside", slow)
    others = [threading.Thread(target=work)]
    others[0].start()
    assert reads.wait(10)
    begun = time.perf_counter()
    runtime.set_adapter(None)
    runtime.set_adapter("a")
    assert torch.equal(logits(runtime.model, IDS), truth["a"])
    assert time.perf_counter() - begun < 5 and not goes_on.is_set()
    goes_on.set()
    others[0].join()
    assert not failed


def test_one_file_is_read_once_for_all_who_want_it_now(folder, truth, monkeypatch):
    runtime = patched(folder)
    goes_on, asked = threading.Event(), []
    read = runtime._tiers._reader.read

    def slow(name: str, *where: object) -> object:
        asked.append(name)
        assert goes_on.wait(10)
        return read(name, *where)

    monkeypatch.setattr(runtime._tiers._reader, "read", slow)
    threads = [threading.Thread(target=runtime.pin, args="b") for _ in range(3)]
    for thread in threads:
        thread.start()
    while not asked:
        time.sleep(0.01)
    time.sleep(0.1)
    goes_on.set()
    for thread in threads:
        thread.join()
    assert asked == ["b"] and runtime.adapters == ["b"]


def test_who_waits_for_anothers_read_is_not_stopped_by_its_ctrl_c(folder, truth, monkeypatch):
    runtime = patched(folder)
    read, begun, waits = runtime._tiers._reader.read, [], threading.Event()

    def interrupted(name: str, *where: object) -> object:
        begun.append(name)
        if len(begun) == 1:
            assert waits.wait(10)
            raise KeyboardInterrupt
        return read(name, *where)

    monkeypatch.setattr(runtime._tiers._reader, "read", interrupted)
    failed = []

    def first() -> None:
        try:
            runtime.pin("b")
        except KeyboardInterrupt as error:
            failed.append(error)

    threads = [threading.Thread(target=first), threading.Thread(target=runtime.pin, args="b")]
    threads[0].start()
    while not begun:
        time.sleep(0.01)
    threads[1].start()
    time.sleep(0.1)
    waits.set()
    for thread in threads:
        thread.join()
    assert (
        len(failed) == 1 and begun == ["b", "b"] and runtime.adapters == ["b"] and not runtime._tiers._reader._reading
    )


def paused_read(runtime: ia3rt.Runtime, monkeypatch: pytest.MonkeyPatch, name: str, work: object) -> threading.Event:
    """Does `work` in a thread that has read `name` once this returns, and brings it in once the event is set."""
    done, goes_on = threading.Event(), threading.Event()
    put, thread = runtime._tiers._reader.kept.put, threading.Thread(target=work)

    def paused(read: str, row: object) -> None:
        put(read, row)
        if threading.current_thread() is thread and read == name:
            done.set()
            assert goes_on.wait(10)

    monkeypatch.setattr(runtime._tiers._reader.kept, "put", paused)
    thread.start()
    assert done.wait(10)
    goes_on.joins = thread.join
    return goes_on


def test_what_was_read_before_does_not_take_the_place_of_what_is_newer(folder, truth, monkeypatch):
    runtime = patched(folder)
    goes_on = paused_read(runtime, monkeypatch, "b", lambda: runtime.route(["b", None, None, None]))
    shutil.rmtree(folder / "b")
    shutil.copytree(folder / "c", folder / "b")
    runtime.set_adapter("b")
    goes_on.set()
    goes_on.joins()
    runtime.set_adapter(None)
    runtime.set_adapter("b")
    assert torch.equal(logits(runtime.model, IDS), truth["c"])


def test_who_sees_new_files_does_not_wait_for_a_read_of_the_old_ones(folder, truth, monkeypatch):
    runtime = patched(folder)
    goes_on = paused_read(runtime, monkeypatch, "b", lambda: runtime.set_adapter(None) or runtime.pin("b"))
    shutil.rmtree(folder / "b")
    shutil.copytree(folder / "c", folder / "b")
    runtime.set_adapter("b")
    assert torch.equal(logits(runtime.model, IDS), truth["c"])
    goes_on.set()
    goes_on.joins()


def test_what_is_pinned_meanwhile_stays(folder, truth, monkeypatch, every_time):
    runtime = patched(folder, rows=3)
    runtime.set_adapter("b")
    runtime.set_adapter("a")
    replace(folder / "b", 0.5)
    goes_on = paused_read(runtime, monkeypatch, "b", lambda: runtime.route(["b", None, None, None]))
    monkeypatch.setattr(tiers, "_FRESH", 1000.0)
    runtime.pin("b")
    goes_on.set()
    goes_on.joins()
    runtime.set_adapter("b")
    assert torch.equal(logits(runtime.model, IDS), truth["b"])


def test_a_copy_has_the_numbers_of_its_adapters_whatever_is_brought_in_meanwhile(folder, truth):
    runtime = patched(folder, rows=4)
    threads = []

    class Meanwhile:
        """Lets another thread bring an adapter in while this is copied."""

        def __deepcopy__(self, memo: object) -> None:
            threads.append(threading.Thread(target=runtime.route, args=(["c", "d", None, "b"],)))
            threads[-1].start()
            threads[-1].join(0.3)

    for name in "ab":
        runtime.set_adapter(name)
    runtime._bank.adapters["a"].config["meanwhile"] = Meanwhile()
    copied = copy.deepcopy(runtime.model)
    other = ia3rt.patch(copied)
    threads[0].join()
    assert other.adapters == ["a", "b"]
    for name in "ab":
        other.set_adapter(name)
        assert torch.equal(logits(copied, IDS), truth[name])
    assert set(runtime.adapters) == set("abcd")


def test_a_load_that_fails_leaves_no_columns_to_what_is_read_meanwhile(folder, truth, monkeypatch):
    runtime = ia3rt.patch(tiny_model(), capacity=4)
    runtime.register(folder)
    file = folder / "b" / "adapter_model.safetensors"
    path = "model.layers.0.mlp.up_proj"
    save_file({**load_file(file), f"base_model.model.{path}.ia3_l": torch.full((96, 1), 3.0)}, file)
    reads, begun, failed = threading.Event(), threading.Event(), []
    read = runtime._tiers._reader.read

    def late(name: str, *where: object) -> object:
        reads.set()
        assert begun.wait(10)
        return read(name, *where)

    def fails(*_: object) -> None:
        begun.set()
        time.sleep(0.5)
        raise MemoryError

    def meanwhile() -> None:
        try:
            runtime.pin("b")
        except Exception as error:
            failed.append(str(error))

    thread = threading.Thread(target=meanwhile)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(runtime._tiers._reader, "read", late)
        patch.setattr(runtime._own, "keep", fails)
        thread.start()
        assert reads.wait(10)
        runtime.add_adapter("x", {(path, "out"): torch.ones(96)})
    thread.join()
    assert len(failed) == 1 and "where the model has no site" in failed[0]
    runtime.add_adapter("y", {("model.layers.1.mlp.up_proj", "out"): torch.ones(96)})
    check(runtime, truth, ["a", "c", None, "a"])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_is_worn_is_laid_by_who_holds_the_lock(folder, monkeypatch, backend):
    """Or a load that lays everything anew could put back what was worn before, or replace the table meanwhile."""
    runtime = ia3rt.patch(tiny_model().to(home(backend)), backend=backend, capacity=2, grow=False)
    runtime.register(folder)
    lay = worn.Shelf.lay

    def checked(self: worn.Shelf, route: object) -> object:
        assert runtime._bank.lock._is_owned()
        return lay(self, route)

    monkeypatch.setattr(worn.Shelf, "lay", checked)
    ids = IDS[:1, :2].to(runtime.model.device)
    with runtime.route(["a"]), runtime.disable_adapter():
        pass
    with runtime.route(["a"]):
        runtime.model.generate(input_ids=ids, max_new_tokens=2, do_sample=True, num_return_sequences=2)


def test_threads_that_route_and_bring_in_at_random(folder, truth):
    """Each forward is that of a model for each adapter, whoever evicts what meanwhile."""
    runtime = patched(folder, rows=4, host_memory=3 * ROW)
    begun, wrong, done = time.monotonic(), [], []

    def goes_on() -> bool:
        """For three seconds, and longer where the machine has other work."""
        taken = time.monotonic() - begun
        return not wrong and (taken < 3 or (len(done) < 40 and taken < 60))

    def work(seed: int) -> None:
        choose = random.Random(seed)
        try:
            while goes_on():
                first, second = choose.sample(NAMES, 2)
                kind = choose.random()
                try:
                    if kind < 0.2:
                        runtime.prefetch(first)
                        continue
                    rows = [first, second, None, choose.choice((first, second))]
                    with runtime.route(rows):
                        worn = logits(runtime.model, IDS)
                except ValueError as error:
                    if "wanted" not in str(error):
                        raise
                    done.append(None)
                    continue
                done.extend(rows)
                wrong.extend(
                    (name, row) for row, name in enumerate(rows) if not torch.equal(worn[row], truth[name][row])
                )
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(done) >= 40
    stats = runtime.stats()
    assert stats.evictions > 0 and held(runtime) == stats.host_bytes <= 3 * ROW and stats.resident <= 4
