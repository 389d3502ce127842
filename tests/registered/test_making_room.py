"""Who makes room for whom in a bank of few rows: nobody who is worn, pinned or loaded."""

from __future__ import annotations

import gc
import threading
from itertools import pairwise

import pytest
import torch
from registering import IDS, NAMES, check, patched
from tiny import logits, tiny_model
from torch.utils.checkpoint import checkpoint
from where import home

import ia3rt
from ia3rt.adapters import device_table, residents


@pytest.fixture
def no_garbage_collection():
    """Leaves it to reference counts what is gone."""
    gc.disable()
    yield
    gc.enable()


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


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_no_row_stays_taken_by_a_whole_forward_that_is_computed_again(folder, reentrant):
    runtime = patched(folder, rows=3)
    model = runtime.model
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    for name in NAMES[:6]:
        runtime.set_adapter(name)
        again = checkpoint(lambda e: model(inputs_embeds=e).logits, embeddings, use_reentrant=reentrant)
        again.sum().backward()
        del again


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
