"""The addresses that a captured forward reads."""

import torch
from tiny import tiny_model
from where import DEVICE

import ia3rt


def addresses(runtime: ia3rt.Runtime) -> tuple[int, ...]:
    tables = runtime._routing.tables
    return tables.mixes.data_ptr(), tables.route.data_ptr(), *(site.data_ptr() for site in tables.bank)


def test_nothing_moves_while_mixes_and_routes_of_as_many_rows_change():
    runtime = ia3rt.patch(tiny_model().to(DEVICE), backend="triton", capacity=12)
    names = [str(number) for number in range(10)]
    for name in names:
        runtime.add_adapter(name, {site.key: torch.ones(site.width) for site in runtime.sites})
    runtime.set_adapter("0")
    before = addresses(runtime)
    for spec in (None, names[:8], {"3": 0.5, "4": 0.1}, "9"):
        runtime.set_adapter(spec)
        assert addresses(runtime) == before
    runtime.route(["0"] * 10)
    before = addresses(runtime)
    runtime.route(names)
    runtime.route([{name: 0.1} for name in reversed(names)])
    assert addresses(runtime) == before
    runtime.delete_adapter("5")
    runtime.add_adapter("new", {site.key: torch.ones(site.width) for site in runtime.sites})
    runtime.route(["new", *names[:5], *names[6:]])
    assert addresses(runtime) == before
