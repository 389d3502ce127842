"""The memory that a captured forward reads."""

import pytest
import torch
from tiny import logits, tiny_model, token_ids
from where import DEVICE

import ia3rt
from ia3rt.routing.worn import Memory


def addresses(memory: Memory) -> tuple[int, ...]:
    (tables,), composed = memory.placed, memory.composed
    return (
        tables.mixes.data_ptr(),
        tables.route.data_ptr(),
        *(site.data_ptr() for site in tables.bank),
        *(scale.data_ptr() for scale in composed._scales),
    )


@torch.no_grad()
def test_what_a_graph_captured_stays_where_it_is_and_follows_each_switch() -> None:
    for backend in ("triton", "torch"):
        runtime = ia3rt.patch(tiny_model().to(DEVICE), backend=backend, capacity=12)
        names = [str(number) for number in range(10)]
        for name in names:
            runtime.add_adapter(name, {site.key: torch.rand(site.width) for site in runtime.sites})

        def follows(memory: Memory, before: tuple[int, ...]) -> None:
            assert addresses(memory) == before
            worn = runtime._routing.now()  # noqa: B023
            if backend == "triton":  # noqa: B023
                for slot, row in enumerate(worn.tables.route.tolist()):
                    mine = memory.placed[0].mixes[memory.placed[0].route[slot]].tolist()
                    theirs = worn.tables.mixes[row].tolist()
                    assert mine[: 2 + mine[1]] == theirs[: 2 + theirs[1]]
            else:
                assert torch.equal(memory.composed.scale(1), worn.composed.scale(1))

        runtime.set_adapter("0")
        runtime._routing.capture(runtime._routing.now())
        alone = runtime._routing.now().memory
        before = addresses(alone)
        for spec in (None, names[:8], {"3": 0.5, "4": 0.1}, "9"):
            runtime.set_adapter(spec)
            follows(alone, before)
        runtime.route(["0"] * 10)
        runtime._routing.capture(runtime._routing.now())
        rows = runtime._routing.now().memory
        before = addresses(rows)
        runtime.route(names)
        follows(rows, before)
        runtime.route([{name: 0.1} for name in reversed(names)])
        follows(rows, before)
        runtime.delete_adapter("5")
        runtime.add_adapter("new", {site.key: torch.rand(site.width) for site in runtime.sites})
        runtime.route(["new", *names[:5], *names[6:]])
        follows(rows, before)
        with runtime.disable_adapter():
            assert addresses(rows) == before
        follows(rows, before)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_forward_after_a_capture_wears_what_is_worn_again(backend) -> None:
    """A switch writes what the graph reads, and what was worn before is not to be read from there again."""
    model, ids = tiny_model().to(DEVICE), token_ids(2).to(DEVICE)
    runtime = ia3rt.patch(model, backend=backend)
    for name in "ab":
        runtime.add_adapter(name, {site.key: torch.rand(site.width) + 0.5 for site in runtime.sites})
    runtime.set_adapter("a")
    expected = logits(model, ids)
    runtime._routing.capture(runtime._routing.now())
    for another in (runtime.disable_adapter, lambda: runtime.route(["b", None])):
        with another():
            assert not torch.equal(logits(model, ids), expected)
        assert torch.equal(logits(model, ids), expected)


@torch.no_grad()
def test_graphs_that_were_captured_under_different_mixes_follow_all_switches() -> None:
    runtime = ia3rt.patch(tiny_model(), backend="torch")
    for name in "abc":
        runtime.add_adapter(name, {site.key: torch.rand(site.width) for site in runtime.sites})
    read = []
    for name in "ab":
        runtime.set_adapter(name)
        read.append(runtime._routing.capture(runtime._routing.now()).composed.scale(0))
    for spec in ("c", None, ["a", "b"]):
        runtime.set_adapter(spec)
        worn = runtime._routing.now().composed.scale(0)
        assert all(torch.equal(each, worn) for each in read)
