"""Registered adapters: brought in when they are named, evicted when nobody wears them, and always the right numbers.

The truth is PEFT's model with the same checkpoints, one adapter at a time, to the bit.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import random
import shutil
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import logits, peft_model, save_each, tiny_model, token_ids
from where import home

import ia3rt
from ia3rt.adapters import device_table, registry, residents, tiers
from ia3rt.routing import worn

NAMES = "abcdef"
IDS = token_ids(rows=4)
WIDTH = 2 * (32 + 32 + 96)
ROW = 4 * WIDTH


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with an adapter's folder for each name, never written to, and what PEFT computes with each of them."""
    wrapped = peft_model(tiny_model(), "llama", NAMES)
    root = tmp_path_factory.mktemp("adapters")
    save_each(wrapped, root)
    with wrapped.disable_adapter():
        truth = {None: logits(wrapped, IDS)}
    for name in NAMES:
        wrapped.set_adapter(name)
        truth[name] = logits(wrapped, IDS)
    return root, truth


@pytest.fixture
def truth(saved):
    return saved[1]


@pytest.fixture
def folder(saved, tmp_path):
    """The same, to be written to."""
    return shutil.copytree(saved[0], tmp_path / "adapters")


@pytest.fixture
def no_garbage_collection():
    """Leaves it to reference counts what is gone."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def every_time(monkeypatch):
    """Looks at files each time an adapter is named, not once a second."""
    monkeypatch.setattr(tiers, "_FRESH", -1.0)


def patched(folder: Path, rows: int = 2, **settings: object) -> ia3rt.Runtime:
    runtime = ia3rt.patch(tiny_model(), capacity=rows, grow=False, **settings)
    assert runtime.register(folder) == list(NAMES)
    return runtime


def check(runtime: ia3rt.Runtime, truth: dict[str | None, torch.Tensor], rows: list[str | None]) -> None:
    """Compares each row of a batch with PEFT's."""
    with runtime.route(rows):
        given = logits(runtime.model, IDS)
    for row, name in enumerate(rows):
        assert torch.equal(given[row], truth[name][row]), (row, name)


def replace(folder: Path, scale: float) -> None:
    """Writes an adapter whose vectors are another's by a factor, as an atomic save does."""
    file = folder / "adapter_model.safetensors"
    tensors = {key: vector * scale for key, vector in load_file(file).items()}
    save_file(tensors, folder / "new", metadata={"format": "pt"})
    (folder / "new").replace(file)


def held(runtime: ia3rt.Runtime) -> int:
    """The bytes of all rows of the host's memory, counted by their storages."""
    rows = runtime._tiers._host._rows.values()
    return sum(row.row.untyped_storage().nbytes() for row in rows)


def test_what_is_registered_is_worn_as_in_peft(folder, truth):
    runtime = patched(folder)
    assert runtime.adapters == [] and runtime.registered_adapters == list(NAMES)
    for _ in range(2):
        for name in NAMES:
            runtime.set_adapter(name)
            assert torch.equal(logits(runtime.model, IDS), truth[name])
            assert runtime.active_adapters == [name] and len(runtime.adapters) <= 2
    for first, second in pairwise(NAMES):
        runtime.set_adapter(None)
        check(runtime, truth, [first, None, second, first])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_no_row_stays_taken_by_what_was_worn(folder, monkeypatch, no_garbage_collection, backend, grad):
    """Neither autograd's memory of forwards nor cycles of objects hold rows, on either backend."""
    monkeypatch.setattr(residents, "_collect", lambda: pytest.fail("only garbage held a row"))
    runtime = ia3rt.patch(tiny_model().to(home(backend)), backend=backend, capacity=2, grow=False)
    runtime.register(folder)
    roomy = ia3rt.patch(tiny_model().to(home(backend)), backend=backend)
    ids, names = IDS[:2, :3].to(runtime.model.device), NAMES if backend == "torch" else NAMES[:4]
    for name in names:
        roomy.load_adapter(folder / name)
    with torch.set_grad_enabled(grad):
        for first, second in pairwise(names):
            with runtime.route([first, second]), roomy.route([first, second]):
                assert torch.equal(runtime.model(ids).logits, roomy.model(ids).logits)


def test_those_used_least_recently_go_first(folder):
    runtime = patched(folder, rows=3)
    for name in "abcab":
        runtime.set_adapter(name)
    runtime.set_adapter("d")
    assert set(runtime.adapters) == set("abd")
    with runtime.route(["a", "e"]):
        assert set(runtime.adapters) == set("ade"), "b was used before a, and d is worn"
    runtime.set_adapter("f")
    assert set(runtime.adapters) == set("def"), "d was worn, which is a use"
    stats = runtime.stats()
    assert (stats.hits, stats.disk_loads, stats.host_loads, stats.evictions) == (3, 6, 0, 3)
    runtime.set_adapter("a")
    assert runtime.stats().host_loads == 1, "it was still in the host's memory"


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


def test_a_forward_keeps_its_numbers_while_others_are_brought_in(folder, truth):
    runtime = patched(folder, rows=3)
    seen = []

    def meanwhile(*_: object) -> None:
        for name in "bcdef":
            runtime.set_adapter(name)
        seen.append(runtime.adapters)

    hook = runtime.model.model.layers[0].register_forward_hook(meanwhile)
    runtime.set_adapter("a")
    assert torch.equal(logits(runtime.model, IDS), truth["a"])
    assert set(seen[0]) == {"a", "e", "f"}, "the forward held its adapter"
    hook.remove()
    assert torch.equal(logits(runtime.model, IDS), truth["f"])
    runtime.set_adapter("d")
    runtime.set_adapter("c")
    assert set(runtime.adapters) == {"f", "d", "c"}, "and holds it no more"


def test_no_row_left_is_an_error_that_says_who_holds_them_and_changes_nothing(folder, truth):
    runtime = patched(folder, rows=4)
    runtime.add_adapter("mine", {site.key: torch.ones(site.width) for site in runtime.sites})
    runtime.pin("a")
    runtime.set_adapter("b")
    runtime.prefetch("c").result()
    resident = runtime._bank.adapters
    before = runtime.adapters, set(resident.evictable), runtime._bank.table.clone(), runtime.stats().evictions
    message = (
        r"2 more rows of the bank wanted, 1 can be had.*1 worn by.*\('b'\).*1 pinned \('a'\).*1 loaded.*\('mine'\)"
    )
    with pytest.raises(ValueError, match=message):
        runtime.route(["d", "e", "b", "b"])
    after = runtime.adapters, set(resident.evictable), runtime._bank.table, runtime.stats().evictions
    assert sorted(after[0]) == sorted(before[0]) and after[1] == before[1] and after[3] == before[3]
    assert torch.equal(after[2], before[2])
    assert torch.equal(logits(runtime.model, IDS), truth["b"])
    check(runtime, truth, ["b", "c", "a", None])
    runtime.unpin("a")
    check(runtime, truth, ["d", "e", "b", "b"])


def test_a_batch_of_more_adapters_than_rows_is_refused(folder, truth):
    runtime = patched(folder)
    runtime.set_adapter("a")
    with pytest.raises(ValueError, match=r"4 adapters are worn at once, and the bank has 2 rows"):
        runtime.route(list("abcd"))
    assert runtime.adapters == ["a"] and torch.equal(logits(runtime.model, IDS), truth["a"])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: shutil.rmtree(folder), FileNotFoundError, "adapter 'b' was registered, and its files are gone"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"),
            ValueError,
            "adapter 'b' was registered, and cannot be read: .* is damaged",
        ),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            FileNotFoundError,
            "adapter 'b' was registered, .* holds neither",
        ),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{"),
            ValueError,
            "adapter 'b' was registered, and cannot be read: .* is damaged",
        ),
        (lambda folder: replace(folder, float("nan")), ValueError, "'b' has a NaN or inf"),
    ],
    ids=["gone", "damaged", "no weights", "broken config", "nan"],
)
@pytest.mark.parametrize("resident", [False, True])
def test_files_that_are_gone_or_damaged_when_they_are_wanted(
    folder, truth, every_time, damage, error, message, resident
):
    runtime = patched(folder)
    if resident:
        runtime.set_adapter("b")
    runtime.set_adapter("a")
    damage(folder / "b")
    for wear in (
        runtime.set_adapter,
        lambda spec: runtime.route([spec, "a", None, None]),
        runtime.pin,
        runtime.get_adapter,
    ):
        with pytest.raises(error, match=message):
            wear("b")
    with pytest.raises(error, match=message):
        runtime.prefetch("b").result()
    assert torch.equal(logits(runtime.model, IDS), truth["a"])
    shutil.rmtree(folder / "b", ignore_errors=True)
    shutil.copytree(folder / "c", folder / "b")
    runtime.set_adapter("b")
    assert torch.equal(logits(runtime.model, IDS), truth["c"])


def test_files_that_changed_are_noticed_and_never_mixed_with_what_is_worn(folder, truth, every_time):
    runtime = patched(folder, rows=3)
    with runtime.route(["b", "b", None, "a"]):
        shutil.rmtree(folder / "b")
        shutil.copytree(folder / "c", folder / "b")
        with runtime.route(["b", "a", "b", None]):
            worn = logits(runtime.model, IDS)
            for row, name in enumerate(["c", "a", "c", None]):
                assert torch.equal(worn[row], truth[name][row])
        worn = logits(runtime.model, IDS)
        for row, name in enumerate(["b", "b", None, "a"]):
            assert torch.equal(worn[row], truth[name][row]), "what was worn before goes on"
    runtime.set_adapter("b")
    assert torch.equal(logits(runtime.model, IDS), truth["c"])
    assert runtime.stats().changed == 1


def test_a_row_in_the_hosts_memory_is_not_used_where_the_files_are_others(folder, truth):
    runtime = patched(folder, rows=1)
    for name in "ab":
        runtime.set_adapter(None)
        runtime.set_adapter(name)
    shutil.rmtree(folder / "a")
    shutil.copytree(folder / "d", folder / "a")
    runtime.set_adapter(None)
    runtime.set_adapter("a")
    assert torch.equal(logits(runtime.model, IDS), truth["d"])


@pytest.mark.parametrize(
    "source",
    [lambda root: {"x": root / "a", "y": str(root / "b")}, lambda root: {"x": root / "a", "y": root / "b"}.get],
)
def test_a_mapping_and_a_function_know_names(folder, truth, source):
    runtime = ia3rt.patch(tiny_model(), capacity=2, grow=False)
    runtime.register(source(folder))
    check(runtime, {**truth, "x": truth["a"], "y": truth["b"]}, ["x", None, "y", "x"])
    with pytest.raises(ValueError, match="unknown adapter 'a': load or register it first"):
        runtime.set_adapter("a")


def test_a_function_that_names_a_folder_for_any_text_leaves_mixes_alone(folder, truth):
    runtime = ia3rt.patch(tiny_model(), capacity=3, grow=False)
    runtime.register(lambda name: folder / name)
    runtime.set_adapter("a*b")
    assert runtime.active_adapters == ["a", "b"]
    runtime.set_adapter("mix:a*0.5+b*0.5")
    check(runtime, truth, ["a", None, "b", "a"])
    with pytest.raises(FileNotFoundError, match="adapter 'z' is not where the function says that was registered"):
        runtime.set_adapter("z")


def test_what_only_garbage_holds_makes_room(folder, truth):
    """As what an error in compiled code leaves behind, until Python looks for it; it may have grown old."""
    runtime = patched(folder, 1)
    runtime.set_adapter("a")
    cycle: list[object] = [runtime._routing.now()]
    cycle.append(cycle)
    for _ in range(3):
        gc.collect(1)  # the oldest generation is not looked at
    del cycle
    runtime.set_adapter(None)
    runtime.set_adapter("b")
    assert torch.equal(logits(runtime.model, IDS), truth["b"])


def test_what_cannot_be_registered_is_refused(folder, tmp_path):
    runtime = patched(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    for source, error, message in (
        (tmp_path / "nowhere", FileNotFoundError, "is no folder"),
        (folder / "a", ValueError, "is an adapter itself"),
        (tmp_path, FileNotFoundError, "folders inside do, 'adapters/a', 'adapters/b', .*name these by a mapping"),
        (empty, FileNotFoundError, "there is no adapter to register"),
        ({"x": folder}, FileNotFoundError, "adapter 'x' is not in"),
        ({"x": folder / "a", "": folder / "a"}, ValueError, "must be a string that is not empty"),
        ({"x": folder / "a", "b": folder / "a"}, ValueError, "'b' is registered already, as"),
        (7, TypeError, "7 is no source"),
        ({"x": None}, TypeError, "adapter 'x' is to be in None, which is no path"),
        ({}, ValueError, "an empty mapping"),
    ):
        with pytest.raises(error, match=message):
            runtime.register(source)
    assert runtime.registered_adapters == list(NAMES)
    for add in (lambda: runtime.load_adapter(folder / "a"), lambda: runtime.add_adapter("a")):
        with pytest.raises(ValueError, match="an adapter named 'a' is registered: delete_adapter it first"):
            add()
    runtime.load_adapter(folder / "a", "mine")
    with pytest.raises(ValueError, match="an adapter named 'mine' is loaded already"):
        runtime.register({"mine": folder / "a"})


def test_adapters_one_folder_deeper_are_not_left_out_in_silence(folder, tmp_path):
    """As PEFT saves an adapter that was trained by a name of its own, into a folder of that name."""
    shutil.move(folder / "f", tmp_path / "f")
    shutil.move(tmp_path / "f", folder / "f" / "f")
    runtime = ia3rt.patch(tiny_model())
    told = r"one folder deeper, 'f/f': name these by a mapping, \{name: folder\}"
    with pytest.warns(UserWarning, match=told) as warned:
        assert runtime.register(folder) == list("abcde")
    assert warned[0].filename == __file__
    for name in "abcde":
        shutil.rmtree(folder / name)
    with pytest.raises(FileNotFoundError, match="; folders inside do, 'f/f': name these"):
        runtime.register(folder)
    assert runtime.register({"f": folder / "f" / "f"}) == ["f"]


def test_what_only_loaded_adapters_can_have(folder):
    file = folder / "b" / "adapter_model.safetensors"
    vectors = load_file(file)
    vectors["base_model.model.model.layers.0.mlp.up_proj.ia3_l"] = torch.ones(96, 1)
    save_file(vectors, file)
    config = json.loads((folder / "c" / "adapter_config.json").read_text())
    (folder / "c" / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    head = {"base_model.model.lm_head.weight": torch.randn(128, 64)}
    save_file(
        {**load_file(folder / "c" / "adapter_model.safetensors"), **head}, folder / "c" / "adapter_model.safetensors"
    )
    runtime = patched(folder)
    with pytest.raises(
        ValueError, match=r"'b' acts at 'model.layers.0.mlp.up_proj' \(output\), where the model has no"
    ):
        runtime.set_adapter("b")
    with pytest.raises(ValueError, match=r"'c' has its own 'lm_head'"):
        runtime.set_adapter("c")
    with pytest.raises(ValueError, match=r"acts at .*up_proj.*and the bank does not grow: name the module in"):
        runtime.load_adapter(folder / "b", "mine")
    assert runtime.adapters == []


def test_loaded_adapters_fill_a_bank_that_does_not_grow(folder):
    runtime = patched(folder)
    runtime.set_adapter("a")
    runtime.load_adapter(folder / "b", "x")
    runtime.set_adapter("x")
    runtime.load_adapter(folder / "b", "y")
    assert runtime.adapters == ["x", "y"]
    with pytest.raises(ValueError, match=r"2 loaded or trained, and not registered \('x', 'y'\)"):
        runtime.load_adapter(folder / "c", "z")
    assert runtime.adapters == ["x", "y"]


def test_a_bank_that_grows_keeps_all_of_them(folder, truth):
    runtime = ia3rt.patch(tiny_model(), capacity=1)
    runtime.register(folder)
    for name in NAMES:
        runtime.set_adapter(name)
        assert torch.equal(logits(runtime.model, IDS), truth[name])
    assert runtime.adapters == list(NAMES) and runtime.stats().evictions == 0
    check(runtime, truth, list("afcd"))


def test_what_a_batch_needs_is_not_evicted_for_the_rest_of_it(folder, truth):
    runtime = patched(folder, rows=3)
    runtime.prefetch("d").result()
    with pytest.raises(ValueError, match=r"3 adapters are worn at once, and 1 more rows for .* the bank has 3 rows"):
        runtime.route([{"a": 0.5, "b": 0.25}, "c", None, None])
    assert runtime.adapters == ["d"]
    check(runtime, truth, ["a", "b", "c", None])


def test_what_weighted_sums_leave_as_it_is_makes_room_too(folder, truth):
    runtime = patched(folder, rows=3)
    runtime.add_adapter("twice", {runtime.sites[0].key: torch.full((runtime.sites[0].width,), 2.0)})
    for _ in range(2):
        runtime.set_adapter({"twice": 0.5})
        assert torch.equal(logits(runtime.model, IDS), truth[None])
        runtime.set_adapter(None)
        runtime.set_adapter({"a": 0.5})
        runtime.set_adapter(None)


def test_weighted_sums_of_registered_adapters_are_those_of_their_vectors(folder, truth):
    runtime = patched(folder, rows=5)
    for first, second in pairwise(NAMES):
        runtime.set_adapter({first: 0.5, second: 0.25})
        worn = logits(runtime.model, IDS)
        other = ia3rt.patch(tiny_model())
        stored = {name: runtime.get_adapter(name).vectors for name in (first, second)}
        other.add_adapter(
            "sum", {s.key: 0.5 * stored[first][s.key] + 0.25 * stored[second][s.key] for s in other.sites}
        )
        other.set_adapter("sum")
        torch.testing.assert_close(worn, logits(other.model, IDS))
    runtime.set_adapter(None)
    check(runtime, truth, ["a", "b", "c", None])


def test_a_pinned_adapter_stays_as_it_was(folder, truth, every_time):
    runtime = patched(folder, rows=3)
    runtime.pin("a")
    replace(folder / "a", 0.5)
    for name in "bcd":
        runtime.set_adapter(name)
    runtime.set_adapter("a")
    assert torch.equal(logits(runtime.model, IDS), truth["a"])
    with pytest.raises(ValueError, match="'b' is not pinned"):
        runtime.unpin("b")
    runtime.unpin("a")
    runtime.set_adapter("a")
    assert not torch.equal(logits(runtime.model, IDS), truth["a"])


def test_what_was_prefetched_is_there(folder, truth):
    runtime = patched(folder)
    runtime.prefetch(["a", "b"]).result()
    assert runtime.adapters == ["a", "b"] and runtime.stats().misses == 2 == runtime.stats().disk_loads
    check(runtime, truth, ["b", "a", None, "a"])
    assert runtime.stats().hits == 2 and runtime.stats().disk_loads == 2
    with pytest.raises(ValueError, match="unknown adapter 'x'"):
        runtime.prefetch(["a", "x"])
    with runtime.route(["a", "b", None, None]):
        runtime.prefetch("c").result()
        assert set(runtime.adapters) == {"a", "b"}, "there is no room for it, so it stays in the host's memory"
    runtime.set_adapter("c")
    assert runtime.stats().host_loads == 1


def test_a_trained_adapter_is_no_more_its_files(folder, truth):
    runtime = patched(folder, rows=3)
    parameters = runtime.train_adapter("a")
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(0.5)
    runtime.end_training()
    trained = logits(runtime.model, IDS)
    for name in "bcd":
        runtime.set_adapter(name)
    runtime.set_adapter("a")
    assert torch.equal(logits(runtime.model, IDS), trained) and not torch.equal(trained, truth["a"])


def test_a_captured_graph_holds_what_it_reads(folder):
    """A graph goes on reading rows after a switch that cannot be written to it, as of another number of rows."""
    runtime = ia3rt.patch(tiny_model().to(home("triton")), backend="triton", capacity=2, grow=False)
    runtime.register(folder)
    runtime.set_adapter("a")
    runtime._routing.capture(runtime._routing.now())
    runtime.route(["b", "b"])
    elsewhere = threading.Thread(target=runtime.set_adapter, args=(None,))
    elsewhere.start()
    elsewhere.join()
    with pytest.raises(ValueError, match=r"2 worn by .*a captured CUDA graph \('a', 'b'\)"):
        runtime.route(["c", "c"])
    runtime.set_adapter("b")  # which is written to the graph
    runtime.set_adapter("c")
    assert set(runtime.adapters) == {"b", "c"}


def test_a_deleted_name_is_unknown(folder, truth):
    runtime = patched(folder)
    runtime.set_adapter("a")
    runtime.delete_adapter("b")
    with pytest.warns(UserWarning, match="'a' was active and is deleted"):
        runtime.delete_adapter("a")
    for name in "ab":
        with pytest.raises(ValueError, match=f"unknown adapter '{name}'"):
            runtime.set_adapter(name)
    assert runtime.registered_adapters == list("cdef")
    assert torch.equal(logits(runtime.model, IDS), truth[None])


def test_a_copy_of_the_model_has_registered_adapters_of_its_own(folder, truth):
    runtime = patched(folder)
    runtime.set_adapter("a")
    copied = copy.deepcopy(runtime.model)
    other = ia3rt.patch(copied)
    other.set_adapter("b")
    assert torch.equal(logits(copied, IDS), truth["b"]) and torch.equal(logits(runtime.model, IDS), truth["a"])
    assert other.adapters == ["a", "b"] and runtime.adapters == ["a"]


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
    read, inside = runtime._tiers._read, registry._inside

    def slow(*given: object) -> object:
        reads.set()
        assert goes_on.wait(10)
        return read(*given) if len(given) == 2 else inside(*given)

    def work() -> None:
        try:
            want(runtime, folder)
        except BaseException as error:
            failed.append(error)

    monkeypatch.setattr(runtime._tiers, "_read", slow)
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
    read = runtime._tiers._read

    def slow(name: str, path: Path) -> object:
        asked.append(name)
        assert goes_on.wait(10)
        return read(name, path)

    monkeypatch.setattr(runtime._tiers, "_read", slow)
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
    read, begun, waits = runtime._tiers._read, [], threading.Event()

    def interrupted(name: str, path: Path) -> object:
        begun.append(name)
        if len(begun) == 1:
            assert waits.wait(10)
            raise KeyboardInterrupt
        return read(name, path)

    monkeypatch.setattr(runtime._tiers, "_read", interrupted)
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
    assert len(failed) == 1 and begun == ["b", "b"] and runtime.adapters == ["b"] and not runtime._tiers._reading


def paused_read(runtime: ia3rt.Runtime, monkeypatch: pytest.MonkeyPatch, name: str, work: object) -> threading.Event:
    """Does `work` in a thread that has read `name` once this returns, and brings it in once the event is set."""
    done, goes_on = threading.Event(), threading.Event()
    put, thread = runtime._tiers._host.put, threading.Thread(target=work)

    def paused(read: str, row: object) -> None:
        put(read, row)
        if threading.current_thread() is thread and read == name:
            done.set()
            assert goes_on.wait(10)

    monkeypatch.setattr(runtime._tiers._host, "put", paused)
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


def test_who_found_an_adapter_wears_it_whatever_became_of_it_before_it_was_worn(folder, truth, every_time):
    """Its files changed, the newer one was brought in and evicted; or somebody deleted it."""
    runtime = patched(folder, rows=3)
    runtime.set_adapter("b")
    runtime.set_adapter(None)
    found = runtime._tiers.fetch(["b"])
    replace(folder / "b", 0.5)
    for name in "bacd":
        runtime.set_adapter(name)
    assert "b" not in runtime.adapters
    runtime._wear_everywhere([ia3rt.Mix(("b",))], found)
    assert torch.equal(logits(runtime.model, IDS), truth["b"])
    runtime.set_adapter("b")
    assert not torch.equal(logits(runtime.model, IDS), truth["b"]), "and from then on the newer one"
    found = runtime._tiers.fetch(["b"])
    runtime.set_adapter(None)
    runtime.delete_adapter("b")
    for wear in (lambda: runtime._pin("b", found), lambda: runtime._wear_everywhere([ia3rt.Mix(("b",))], found)):
        with pytest.raises(ValueError, match="unknown adapter 'b'"):
            wear()


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


def test_files_that_are_written_over_within_a_tick_of_their_clock(folder, truth, every_time):
    """In place, as long as before: only the time says that they are others, and it goes in steps."""
    runtime = patched(folder)
    file, tick = folder / "c" / "adapter_model.safetensors", 25 * 10**6
    written = {name: (folder / name / "adapter_model.safetensors").read_bytes() for name in "ab"}
    for _ in range(20):
        for name, content in written.items():
            file.write_bytes(content)
            now = time.time_ns() // tick * tick
            os.utime(file, ns=(now, now))
            runtime.set_adapter("c")
            assert torch.equal(logits(runtime.model, IDS), truth[name])


def test_where_there_is_no_room_for_a_changed_adapter_the_one_of_before_stays(folder, truth, every_time):
    runtime = patched(folder, rows=2)
    runtime.set_adapter("b")
    with runtime.route(["a", "b", None, None]):
        replace(folder / "b", 0.5)
        with pytest.raises(ValueError, match="1 more row of the bank wanted, 0 can be had"):
            runtime.route(["b", None, None, None])
        assert runtime.adapters == ["b", "a"]
    runtime.set_adapter(None)
    runtime.set_adapter("b")
    assert not torch.equal(logits(runtime.model, IDS), truth["b"])


def test_a_row_that_cannot_be_written_is_free_again(folder, truth, monkeypatch):
    runtime = patched(folder)
    runtime.set_adapter("a")
    runtime._tiers.fetch(["b"])  # into the host's memory

    def fails(_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(device_table, "pieces", fails)
        for _ in range(3):
            with pytest.raises(MemoryError):
                runtime.set_adapter("b")
    assert torch.equal(logits(runtime.model, IDS), truth["a"])
    check(runtime, truth, ["a", "b", "a", None])


def test_what_is_merged_is_what_is_worn_and_not_what_its_files_are_now(folder, truth, every_time):
    runtime = patched(folder)
    runtime.set_adapter("b")
    replace(folder / "b", 0.5)
    runtime.merge_adapter()
    torch.testing.assert_close(logits(runtime.model, IDS), truth["b"])
    runtime.unmerge_adapter()
    runtime.merge_adapter("b")
    assert not torch.allclose(logits(runtime.model, IDS), truth["b"])


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
    read = runtime._tiers._read

    def late(name: str, folder: Path) -> object:
        reads.set()
        assert begun.wait(10)
        return read(name, folder)

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
        patch.setattr(runtime._tiers, "_read", late)
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
    end, wrong, done = time.monotonic() + 3, [], []

    def work(seed: int) -> None:
        choose = random.Random(seed)
        try:
            while time.monotonic() < end and not wrong:
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
    assert not wrong and len(done) > 20
    stats = runtime.stats()
    assert stats.evictions > 5 and held(runtime) == stats.host_bytes <= 3 * ROW and stats.resident <= 4


def other_model(folder: Path, layer: int, width: int) -> None:
    """Makes b an adapter of another model."""
    vectors = {f"base_model.model.model.layers.{layer}.self_attn.k_proj.ia3_l": torch.ones(width, 1)}
    save_file(vectors, folder / "b" / "adapter_model.safetensors", metadata={"format": "pt"})


def gone(folder: Path) -> None:
    shutil.rmtree(folder / "b")


def damaged(folder: Path) -> None:
    (folder / "b" / "adapter_model.safetensors").write_bytes(b"{}")


def nothing(folder: Path) -> None:
    """All is well."""


REFUSED = {
    "gone": (gone, ["d", "b"], "its files are gone"),
    "damaged": (damaged, {"d": 0.5, "b": 0.5}, "is damaged"),
    "of a model of another size": (lambda folder: other_model(folder, 0, 48), ["d", "b"], "'b' has a vector of shape"),
    "of a model of more layers": (lambda folder: other_model(folder, 7, 32), {"d": 1.0, "b": 2.0}, "'b' acts at"),
    "more than there are rows": (nothing, ["a", "b", "c", "d"], "4 adapters are worn at once"),
    "and for the rest of a sum": (nothing, {"b": 0.5, "c": 0.1, "d": 0.1}, "and 1 more rows for what weighted sums"),
    "unknown": (nothing, ["d", "x"], "unknown adapter 'x'"),
    "weights that do not fit": (nothing, {"adapters": ["d", "b"], "weights": [0.5]}, "1 weights for 2 adapters"),
    "no weights": (nothing, {"adapters": ["d", "b"], "combination_type": "linear"}, "needs weights"),
    "a weight that is no number": (nothing, {"d": float("nan")}, "finite"),
    "text that is no mix": (nothing, "mix:d*half", "is no finite number"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("door", ["set", "route", "merge"])
def test_what_is_refused_leaves_everything_as_it_was(folder, truth, case, door):
    runtime = patched(folder, rows=3)
    runtime.pin("e")
    runtime.set_adapter("f")
    runtime.set_adapter("a")
    damage, spec, message = REFUSED[case]
    damage(folder)
    wear = {
        "set": runtime.set_adapter,
        "route": lambda spec: runtime.route([None, spec, None, None]),
        "merge": runtime.merge_adapter,
    }

    def state() -> tuple[object, ...]:
        own, free, told = runtime._bank.adapters, runtime._bank._free.rows, runtime.stats()
        return runtime.adapters, list(own.evictable), sorted(own.pinned), list(free), told.evictions, told.resident

    before, table = state(), runtime._bank.table.clone()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        wear[door](spec)
    assert state() == before and torch.equal(runtime._bank.table, table)
    assert runtime.active_adapters == ["a"] and torch.equal(logits(runtime.model, IDS), truth["a"])
    check(runtime, truth, ["c", "e", None, "c"])


@pytest.mark.parametrize(
    "given",
    [{"start": -1}, {"start": [0, 1, 2]}, {"images": [7]}, {"index": torch.tensor([0, 9])}, {"index": [0, 1]}],
    ids=str,
)
def test_a_refused_route_brings_nothing_in(folder, truth, given):
    runtime = patched(folder, rows=3)
    runtime.set_adapter("a")
    with pytest.raises(ValueError, match="start|images|index"):
        runtime.route(["b", "c"], **given)
    assert runtime.adapters == ["a"] and torch.equal(logits(runtime.model, IDS), truth["a"])


HEAD = "model.layers.0.self_attn.k_proj"
FOR_WHAT_THEY_ARE = {
    "a product": (lambda runtime: runtime.set_adapter(["own", "b"]), "which wears no vector"),
    "a product in a row": (lambda runtime: runtime.route([None, {"own": 0.5, "b": 0.5}]), "which wears no vector"),
    "a token": (lambda runtime: runtime.route(["own", "b"], torch.tensor([[0, 1]])), "not by token"),
    "a start": (lambda runtime: runtime.route(["own", "b"], start=[2, 2]), "not by token, nor from a start on"),
    "training": (lambda runtime: runtime.train_adapter(["own", "b"]), "which wears no vector"),
    "a name of its own that is taken": (
        lambda runtime: runtime.train_adapter(["own", "d"]),
        "'own' cannot be trained: .* has a 'ia3_own_own_weight' already",
    ),
    "a name that is taken": (lambda runtime: runtime.train_adapter("d"), "give the adapter another name"),
}


@pytest.mark.parametrize("case", FOR_WHAT_THEY_ARE)
def test_what_is_refused_for_what_its_adapters_are_makes_no_room(folder, truth, case):
    call, message = FOR_WHAT_THEY_ARE[case]
    runtime = patched(folder, rows=3)
    layer = runtime.model.get_submodule(HEAD)
    runtime.add_adapter("own", {"model.layers.1.self_attn.k_proj": torch.ones(32)}, modules={HEAD: layer.state_dict()})
    if case == "a name that is taken":
        layer.ia3_out_d = "somebody's own"
    elif case == "a name of its own that is taken":
        layer.ia3_own_own_weight = "somebody's own"
        runtime.set_adapter("own")
    runtime.set_adapter("a")
    runtime.set_adapter("c")
    with pytest.raises(ValueError, match=message):
        call(runtime)
    assert runtime.adapters == ["own", "a", "c"] and runtime.stats().evictions == 0
    assert torch.equal(logits(runtime.model, IDS), truth["c"])


def test_a_route_over_experts_makes_no_room(tmp_path):
    experts = torch.nn.ModuleDict({"experts": torch.nn.ModuleList([torch.nn.Linear(4, 4)])})
    where = dict(target_modules=["0"], feedforward_modules=["0"])
    maker = ia3rt.patch(copy.deepcopy(experts), **where)
    for name in "bc":
        maker.add_adapter(name, {"experts.0": torch.rand(4)})
        maker.save_adapter(name, tmp_path / name)
    runtime = ia3rt.patch(experts, **where, capacity=1, grow=False)
    runtime.register(tmp_path)
    runtime.set_adapter("c")
    runtime.set_adapter(None)
    with pytest.raises(ValueError, match="inside a mixture's experts"):
        runtime.route([None, "b"])
    assert runtime.adapters == ["c"]


@pytest.mark.parametrize("density", [0.0, -0.5, 1.5, float("nan")])
def test_a_density_outside_of_its_bounds_brings_nothing_in(folder, truth, density):
    runtime = patched(folder, rows=3)
    runtime.set_adapter("a")
    with pytest.raises(ValueError, match=r"density is .* lies in \(0, 1\]"):
        runtime.add_weighted_adapter(["a", "b"], [1.0, 1.0], "n", "ties", density=density)
    assert runtime.adapters == ["a"] and torch.equal(logits(runtime.model, IDS), truth["a"])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_graph_that_was_captured_has_to_be_captured_again_where_the_bank_grows(folder, recwarn, backend):
    runtime = ia3rt.patch(tiny_model().to(home(backend)), backend=backend, capacity=2)
    runtime.register(folder)
    runtime.set_adapter("a")
    runtime.set_adapter("b")
    runtime._routing.capture(runtime._routing.now())
    with pytest.warns(UserWarning, match=r"must not be replayed. Capture them again; patch\(capacity=…, grow=False\)"):
        runtime.set_adapter("c")
    recwarn.clear()
    for name in NAMES:  # it grows again, and no graph is left that reads it
        runtime.set_adapter(name)
    assert not [each for each in recwarn if "Capture them again" in str(each.message)]


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
