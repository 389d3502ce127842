"""A layer's class may be of any making, and where patching or loading fails, all is as it was."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, ABCMeta
from typing import Generic, Protocol, TypeVar

import pytest
import torch
from tiny import logits, peft_model, tiny_model, token_ids
from torch import nn

import ia3rt
from ia3rt.modules import attention, drop_ins
from ia3rt.routing import generation
from ia3rt.routing.routing import Routing

IDS = token_ids()
T = TypeVar("T")


class AbstractMixin(ABC):  # noqa: B024  (so is optimum-quanto's)
    def scaled(self, x):
        return 3 * x


class PlainMixin:
    pass


class Protocoled(Protocol):
    pass


class Counting(ABCMeta):
    pass


class FromAbstract(AbstractMixin, nn.Linear):
    """As optimum-quanto's QLinear."""

    def forward(self, x):
        return self.scaled(super().forward(x))


class FromPlain(PlainMixin, nn.Linear):
    pass


class FromGeneric(Generic[T], nn.Linear):
    pass


class FromProtocol(Protocoled, nn.Linear):
    pass


class WithMetaclass(nn.Linear, metaclass=Counting):
    pass


class MixinWithMetaclass(PlainMixin, nn.Linear, metaclass=Counting):
    pass


class WithSlots(nn.Linear):
    __slots__ = ("extra",)


class MixinWithSlots(AbstractMixin, nn.Linear):
    __slots__ = ("extra",)


class MixinLast(nn.Linear, AbstractMixin):
    pass


class Registered(AbstractMixin, nn.Linear):
    """A base class that wants to be told something by each of its subclasses."""

    def __init_subclass__(cls, *, kind: str) -> None:
        super().__init_subclass__()


class ByKeyword(nn.Linear):
    def __init_subclass__(cls, *, kind: str) -> None:
        super().__init_subclass__()


class OfFixedClass(nn.Linear):
    def __setattr__(self, name, value):
        if name == "__class__":
            raise AttributeError("its class is fixed")
        super().__setattr__(name, value)


class Sealed(type):
    def __new__(cls, name, bases, namespace):
        if any(isinstance(base, Sealed) for base in bases):
            raise TypeError("sealed")
        return super().__new__(cls, name, bases, namespace)


class SealedLinear(nn.Linear, metaclass=Sealed):
    pass


CLASSES = [
    OfFixedClass,
    FromAbstract,
    FromPlain,
    FromGeneric,
    FromProtocol,
    WithMetaclass,
    MixinWithMetaclass,
    WithSlots,
    MixinWithSlots,
    MixinLast,
    Registered,
    ByKeyword,
]


def block(cls):
    torch.manual_seed(0)
    kinds = dict(q_proj=nn.Linear, k_proj=nn.Linear, v_proj=cls, up_proj=nn.Linear, down_proj=cls)
    return nn.ModuleDict({name: kind(8, 8) for name, kind in kinds.items()})


@pytest.mark.parametrize("cls", CLASSES)
def test_it_is_wrapped_and_given_back(cls):
    model, x = block(cls), torch.randn(2, 8)
    before = {name: layer(x) for name, layer in model.items()}
    runtime = ia3rt.patch(model)
    vectors = {site.key: torch.rand(8) for site in runtime.sites}
    assert vectors.keys() == {("k_proj", "out"), ("v_proj", "out"), ("down_proj", "in")}
    runtime.add_adapter("a", vectors)
    assert all(torch.equal(layer(x), before[name]) for name, layer in model.items())
    runtime.set_adapter("a")
    torch.testing.assert_close(model["k_proj"](x), before["k_proj"] * vectors["k_proj", "out"])
    torch.testing.assert_close(model["v_proj"](x), before["v_proj"] * vectors["v_proj", "out"])
    expected = block(cls)["down_proj"](x * vectors["down_proj", "in"])
    torch.testing.assert_close(model["down_proj"](x), expected)
    assert isinstance(model["v_proj"], cls)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied["v_proj"](x), before["v_proj"] * vectors["v_proj", "out"])
    torch.compiler.reset()
    compiled = torch.compile(model["v_proj"], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), before["v_proj"] * vectors["v_proj", "out"])
    runtime.unpatch()
    assert type(model["v_proj"]) is cls
    assert all(torch.equal(layer(x), before[name]) for name, layer in model.items())


def test_a_class_that_lets_none_be_made_of_it_is_named():
    model = block(SealedLinear)
    was = state(model)
    with pytest.raises(ValueError, match="'v_proj' cannot be patched, as no class can be made of SealedLinear: sealed"):
        ia3rt.patch(model)
    assert state(model) == was
    ia3rt.patch(model, target_modules=["k_proj"])


def state(model: nn.Module) -> object:
    return [
        (name, type(module), sorted(vars(module)), len(module._forward_hooks)) for name, module in model.named_modules()
    ]


def _fails_at(number):
    """An error of any kind at the given call."""
    calls = []

    def wrapped(function):
        def fail(*args, **kwargs):
            calls.append(1)
            if len(calls) == number:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return fail

    return wrapped


STEPS = {
    "a module is wrapped": (drop_ins, "wrap"),
    "a module's wearer is looked for": (drop_ins, "wearers_of"),
    "a site is placed": (drop_ins, "place"),
    "the route is written": (Routing, "refresh"),
    "generate is wrapped": (generation, "install"),
    "attention is registered": (attention, "register"),
}


@pytest.mark.parametrize("wrapped_by_peft", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize(("owner", "name"), STEPS.values(), ids=STEPS)
def test_whatever_fails_patching_changes_nothing(owner, name, number, wrapped_by_peft, monkeypatch):
    model = peft_model(tiny_model(), "llama") if wrapped_by_peft else tiny_model()
    before, was = logits(model, IDS), state(model)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, _fails_at(number)(getattr(owner, name)))
        try:
            ia3rt.patch(model).unpatch()
        except KeyboardInterrupt:
            pass
        else:
            assert number > 1, "this step is not taken"
    assert state(model) == was
    assert torch.equal(logits(model, IDS), before)
    runtime = ia3rt.patch(model)
    assert torch.equal(logits(model, IDS), before)
    runtime.unpatch()


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(("owner", "name"), list(STEPS.values())[:4], ids=list(STEPS)[:4])
def test_whatever_fails_loading_an_adapter_with_new_sites_changes_nothing(owner, name, number, monkeypatch):
    model = tiny_model()
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a", {site.key: torch.rand(site.width) for site in runtime.sites})
    runtime.set_adapter("a")
    before, was, sites = logits(model, IDS), state(model), runtime.sites
    wide = {(f"model.layers.{layer}.mlp.up_proj", "out"): torch.rand(96) for layer in (0, 1)}
    fails = number == 1 or name != "refresh"  # the route is written once
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, _fails_at(number)(getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt) if fails else contextlib.nullcontext():
            runtime.add_adapter("wide", wide)
    if fails:
        assert state(model) == was
        assert torch.equal(logits(model, IDS), before)
        assert (runtime.adapters, runtime.sites) == (["a"], sites)
        runtime.add_adapter("wide", wide)
    assert torch.equal(logits(model, IDS), before)
    runtime.set_adapter("wide")
    other = tiny_model()
    for (path, _), vector in wide.items():
        other.get_submodule(path).weight.data *= vector.unsqueeze(1)
        other.get_submodule(path).bias.data *= vector
    torch.testing.assert_close(logits(model, IDS), logits(other, IDS), rtol=1e-4, atol=1e-5)


def test_a_class_that_other_code_made_of_a_drop_in_is_made_of_the_original_again():
    """As fully_shard() and parametrize do."""
    model = tiny_model()
    runtime = ia3rt.patch(model)
    layer = model.get_submodule("model.layers.1.self_attn.v_proj")
    layer.__class__ = type("ShardedLinear", (type(layer),), {"shards": 2})
    runtime.add_adapter("a", {site.key: torch.rand(site.width) for site in runtime.sites})
    runtime.add_adapter("b", {("model.layers.0.mlp.up_proj", "out"): torch.rand(96)})  # a site more
    runtime.set_adapter("a")
    assert not torch.equal(logits(model, IDS), logits(tiny_model(), IDS))
    runtime.unpatch()
    assert (type(layer).__name__, type(layer).__bases__, type(layer).shards) == ("ShardedLinear", (nn.Linear,), 2)
    assert torch.equal(logits(model, IDS), logits(tiny_model(), IDS))
