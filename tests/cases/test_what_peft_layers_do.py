"""patch() goes on with what PEFT's layers compute, not with what the model object says is active."""

from __future__ import annotations

import peft
import pytest
import torch
from tiny import logits, peft_model, randomize, tiny_model, token_ids

import ia3rt

IDS = token_ids()
K, V, DOWN = (f"model.layers.{{}}.{name}" for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"))


@pytest.fixture
def wrapped():
    return peft_model(tiny_model(), "llama")


def layers(wrapped):
    return {name: layer for name, layer in wrapped.get_base_model().named_modules() if hasattr(layer, "ia3_l")}


def _all(names):
    def change(found):
        for layer in found.values():
            layer.set_adapter(names)

    return change


def _other_order(found):
    for number, layer in enumerate(found.values()):
        layer.set_adapter(["b", "c"] if number % 2 else ["c", "b"])


def _unknown_to_a_disabled_layer(found):
    del found[K.format(0)].ia3_l["b"]
    found[K.format(0)].enable_adapters(False)


def _lacking(found):
    del found[K.format(0)].ia3_l["b"]
    del found[DOWN.format(1)].ia3_l["c"]
    _all(["b", "c"])(found)


SAYABLE = {
    "a product that the model does not name": (_all(["b", "c"]), ["b", "c"]),
    "an adapter twice": (_all(["c", "c"]), ["c"]),
    "nothing": (_all([]), []),
    "another adapter": (_all("d"), ["d"]),
    "another order": (_other_order, ["b", "c"]),
    "a disabled layer that lacks it": (_unknown_to_a_disabled_layer, ["b"]),
    "layers that lack one or the other": (_lacking, ["b", "c"]),
}


@pytest.mark.parametrize(("change", "active"), SAYABLE.values(), ids=SAYABLE)
def test_what_a_mix_can_say_is_worn(wrapped, change, active):
    change(layers(wrapped))
    before = logits(wrapped, IDS)
    runtime = ia3rt.patch(wrapped)
    assert sorted(runtime.active_adapters) == active
    torch.testing.assert_close(logits(wrapped, IDS), before, rtol=1e-5, atol=1e-6)
    runtime.unpatch()
    assert torch.equal(logits(wrapped, IDS), before)


def _disable_one(found):
    found[V.format(1)].enable_adapters(False)


def _another_at_one(found):
    found[V.format(1)].set_adapter("c")


def _more_at_one(found):
    found[V.format(1)].set_adapter(["b", "c"])


def _twice_at_one(found):
    found[V.format(1)].set_adapter(["b", "b"])


UNSAYABLE = {
    "one layer is disabled": (_disable_one, rf"'b' acts once at '{K.format(0)}' and not at '{V.format(1)}'"),
    "one layer has another": (_another_at_one, rf"'b' acts once at '{K.format(0)}' and not at '{V.format(1)}'"),
    "one layer has more": (_more_at_one, rf"'c' acts not at '{K.format(0)}' and once at '{V.format(1)}'"),
    "one layer has it twice": (_twice_at_one, rf"'b' acts once at '{K.format(0)}' and 2 times at '{V.format(1)}'"),
}


@pytest.mark.parametrize(("change", "message"), UNSAYABLE.values(), ids=UNSAYABLE)
def test_a_difference_between_layers_is_refused_by_name(wrapped, change, message):
    change(layers(wrapped))
    before, modules = logits(wrapped, IDS), [type(module) for module in wrapped.modules()]
    with pytest.raises(ValueError, match=message):
        ia3rt.patch(wrapped)
    assert [type(module) for module in wrapped.modules()] == modules
    assert torch.equal(logits(wrapped, IDS), before)
    wrapped.set_adapter("b")
    wrapped.base_model.enable_adapter_layers()
    ia3rt.patch(wrapped)


@pytest.mark.parametrize("active", ["first", "second"])
def test_an_adapter_with_more_layers_than_the_first(active):
    def config(*names):
        return peft.IA3Config(target_modules=[*names], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")

    wrapped = peft.get_peft_model(tiny_model(), config("k_proj", "down_proj"), "first")
    wrapped.add_adapter("second", config("k_proj", "up_proj", "o_proj", "down_proj"))
    randomize(wrapped, seed=3)
    wrapped.set_adapter(active)
    before = logits(wrapped.eval(), IDS)
    runtime = ia3rt.patch(wrapped)
    assert runtime.active_adapters == [active]
    assert torch.equal(logits(wrapped, IDS), before)
