"""What is refused brings nothing in, makes no room, and leaves everything as it was."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from registering import IDS, check, patched
from safetensors.torch import save_file
from tiny import logits

import ia3rt


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
