"""The memory that a captured forward reads."""

import torch
from tiny import tiny_model
from where import DEVICE

import ia3rt
from ia3rt.routing.worn import Memory


def addresses(memory: Memory) -> tuple[int, ...]:
    tables, composed = memory.tables, memory.composed
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
                    mine = memory.tables.mixes[memory.tables.route[slot]].tolist()
                    theirs = worn.tables.mixes[row].tolist()
                    assert mine[: 2 + mine[1]] == theirs[: 2 + theirs[1]]
            else:
                assert torch.equal(memory.composed.scale(1), worn.composed.scale(1))

        runtime.set_adapter("0")
        runtime._routing.capture()
        alone = runtime._routing.now().memory
        before = addresses(alone)
        for spec in (None, names[:8], {"3": 0.5, "4": 0.1}, "9"):
            runtime.set_adapter(spec)
            follows(alone, before)
        runtime.route(["0"] * 10)
        runtime._routing.capture()
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
