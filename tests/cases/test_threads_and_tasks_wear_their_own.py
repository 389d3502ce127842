"""Threads, and tasks of an event loop, use one model at once: each wears what it said."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import logits, patched, tiny_model
from torch import Tensor
from where import TRITON, home
from worn_truth import IDS, NAMES, close, truth

import ia3rt


@pytest.fixture
def runtime() -> ia3rt.Runtime:
    return patched(tiny_model())


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_threads_wear_their_own(backend) -> None:
    """Threads that route, threads that wear what all do, and one that loads and deletes meanwhile."""

    model = tiny_model().to(home(backend))
    runtime = ia3rt.patch(model, backend=backend, capacity=2)
    for name in NAMES:
        runtime.add_adapter(name, {site.key: torch.rand(site.width) + 0.5 for site in runtime.sites})
    expected = {None: tiny_model().double()} | {name: truth(runtime, name) for name in NAMES}
    right = {name: logits(each, IDS) for name, each in expected.items()}
    runtime.set_adapter("b")
    stop = threading.Event()

    def load() -> None:
        number = 0
        while not stop.is_set():
            runtime.add_adapter(f"x{number}", {site.key: torch.zeros(site.width) for site in runtime.sites})
            if number:
                runtime.delete_adapter(f"x{number - 1}")
            number += 1

    def forward(turn: int) -> None:
        names = [("a", None, "b")[(turn + row) % 3] for row in range(3)]
        if turn % 4 == 0:
            close(logits(model, IDS), right["b"])
        elif turn % 4 == 1:
            with runtime.disable_adapter():
                close(logits(model, IDS), right[None])
        else:
            with runtime.route(names):
                result = logits(model, IDS)
            for row, name in enumerate(names):
                close(result[row], right[name][row])

    loading = threading.Thread(target=load)
    loading.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(forward, turn) for turn in range(24 if backend == "torch" else 8)]:
                done.result()
    finally:
        stop.set()
        loading.join()
    assert runtime.active_adapters == ["b"]


def test_what_is_set_while_another_thread_computes_is_for_its_next_forward(runtime) -> None:
    model, inside, go_on = runtime.model, threading.Event(), threading.Event()
    runtime.set_adapter("a")

    def wait(*_: object) -> None:
        inside.set()
        assert go_on.wait(60)

    hook = model.model.layers[0].register_forward_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(logits, model, IDS)
        assert inside.wait(60)
        hook.remove()
        runtime.set_adapter("b")
        after = logits(model, IDS)
        go_on.set()
        close(running.result(), logits(truth(runtime, "a"), IDS))
    close(after, logits(truth(runtime, "b"), IDS))


def test_tasks_of_an_event_loop_wear_their_own(runtime) -> None:
    async def answer(name: str) -> Tensor:
        with runtime.route([name] * 3):
            await asyncio.sleep(0)
            first = logits(runtime.model, IDS)
            await asyncio.sleep(0)
            assert torch.equal(logits(runtime.model, IDS), first)
        return first

    async def answers() -> list[Tensor]:
        return await asyncio.gather(*map(answer, "abab"))

    for name, result in zip("abab", asyncio.run(answers()), strict=True):
        close(result, logits(truth(runtime, name), IDS))


def test_a_route_in_another_thread_cannot_be_worn_over_merged_weights(runtime) -> None:
    ready, merged = threading.Event(), threading.Event()

    def forward() -> Tensor:
        with runtime.route(["a", None, "b"]):
            ready.set()
            assert merged.wait(60)
            return logits(runtime.model, IDS)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(forward)
        assert ready.wait(60)
        runtime.merge_adapter("b")
        merged.set()
        with pytest.raises(RuntimeError, match="merged into the weights"):
            running.result()
    close(logits(runtime.model, IDS), logits(truth(runtime, "b"), IDS))


def test_nothing_of_a_model_stays_in_its_thread() -> None:
    import gc
    import weakref

    model = tiny_model()
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a", {site.key: torch.rand(site.width) for site in runtime.sites})
    runtime.route(["a", None, "a"])
    logits(model, IDS)
    with runtime.route(["a"] * 3):
        model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2)
    worn = weakref.ref(runtime._routing.now())
    runtime.unpatch()
    del runtime, model
    gc.collect()
    assert worn() is None


def test_a_forward_wears_its_own_head_while_the_bank_grows(monkeypatch) -> None:
    """For a row more no module is touched, which a forward of another thread may be about to call."""
    runtime = ia3rt.patch(tiny_model(), capacity=1)
    head = {"lm_head": {"weight": torch.randn(128, 64)}}
    runtime.add_adapter("h", {site.key: torch.full((site.width,), 0.5) for site in runtime.sites}, modules=head)
    runtime.set_adapter("h")
    right, seen, place = logits(runtime.model, IDS), [], runtime._placement.drop_ins.place

    def meanwhile(sites) -> None:
        thread = threading.Thread(target=lambda: seen.append(logits(runtime.model, IDS)))
        thread.start()
        thread.join()
        place(sites)

    monkeypatch.setattr(runtime._placement.drop_ins, "place", meanwhile)
    for name in "xyz":
        runtime.add_adapter(name)
    assert len(runtime._bank.table) > 4
    for each in (*seen, logits(runtime.model, IDS)):
        assert torch.equal(each, right)
    runtime.set_adapter("z")
    assert not torch.equal(logits(runtime.model, IDS), right)


def test_a_route_is_entered_where_it_is_called(runtime) -> None:
    """It takes effect when it is called; entered elsewhere, or after another one, it would wear what that says."""
    first, second = runtime.route(["a"] * 3), runtime.route(["b"] * 3)
    with pytest.raises(RuntimeError, match="something else is worn here"), first:
        pass
    with second:
        close(logits(runtime.model, IDS), logits(truth(runtime, "b"), IDS))
    with pytest.raises(RuntimeError, match="entered before"), second:
        pass
    third = runtime.route(["a"] * 3)
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="for the thread or task that calls it"):
        pool.submit(third.__enter__).result()
    close(logits(runtime.model, IDS), logits(truth(runtime, "a"), IDS))
    runtime.set_adapter("b")
    with pytest.raises(RuntimeError, match="something else is worn here"), third:
        pass
    close(logits(runtime.model, IDS), logits(truth(runtime, "b"), IDS))
