"""Merging one adapter after another, and for good: as PEFT does, and unmerged bit for bit."""

from __future__ import annotations

import copy
import re

import peft
import pytest
import torch
from tiny import DTYPES, FAMILIES, logits, peft_model, save_each, tiny_model, token_ids
from torch import nn

import ia3rt

IDS = token_ids()


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def pair(family, tmp_path):
    """(PEFT's model, a Runtime with the same adapters)."""
    wrapped = peft_model(tiny_model(family), family)
    runtime = ia3rt.patch(tiny_model(family))
    for folder in save_each(wrapped, tmp_path):
        runtime.load_adapter(folder)
    return wrapped, runtime


def close(runtime, wrapped):
    weights = dict(runtime.model.named_parameters())
    for name, weight in wrapped.get_base_model().named_parameters():
        if "ia3_l" not in name:
            torch.testing.assert_close(weights[name.replace(".base_layer", "")], weight, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("order", [["b", "c"], ["d", "b", "c"], [["b", "c"], "d"]], ids=str)
def test_one_after_another_as_in_peft(pair, order):
    wrapped, runtime = pair
    before = {name: parameter.clone() for name, parameter in runtime.model.named_parameters()}
    runtime.set_adapter("c")
    worn = logits(runtime.model, IDS)
    for names in order:
        runtime.merge_adapter(names)
        wrapped.merge_adapter([names] if isinstance(names, str) else names)
        close(runtime, wrapped)
        torch.testing.assert_close(logits(runtime.model, IDS), logits(wrapped, IDS), rtol=1e-4, atol=1e-5)
    runtime.unmerge_adapter()
    assert all(torch.equal(parameter, before[name]) for name, parameter in runtime.model.named_parameters())
    assert torch.equal(logits(runtime.model, IDS), worn)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_after_another_is_rounded_once_as_all_at_once(family, dtype):
    models = []
    for steps in (["b", ["c", "d"]], [["b", "c", "d"]]):
        wrapped = peft_model(tiny_model(family, dtype), family)
        runtime = ia3rt.patch(wrapped)
        for step in steps:
            runtime.merge_adapter(step)
        models.append(runtime.model)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_what_is_merged_is_not_merged_again_as_in_peft(pair):
    wrapped, runtime = pair
    runtime.merge_adapter("b")
    wrapped.merge_adapter(["b"])
    for names, again in ((["b", "c"], ["b"]), (["c", "b"], ["c", "b"]), (["c"], ["c"])):
        with pytest.warns(
            UserWarning, match=re.escape(f"adapters {again} are merged already, and are not merged again")
        ):
            runtime.merge_adapter(names)
        with pytest.warns(UserWarning):
            wrapped.merge_adapter(names)
        close(runtime, wrapped)


def test_what_all_rows_wore_is_merged_after_another(pair):
    wrapped, runtime = pair
    runtime.set_adapter("d")
    wrapped.set_adapter("d")
    runtime.merge_adapter("b")
    wrapped.merge_adapter(["b"])
    runtime.merge_adapter()
    wrapped.merge_adapter()
    close(runtime, wrapped)
    assert runtime.active_adapters == ["d"]


def test_a_weighted_sum_is_merged_once(pair):
    _, runtime = pair
    runtime.merge_adapter({"b": 0.5, "c": 0.5})
    merged = {name: parameter.clone() for name, parameter in runtime.model.named_parameters()}
    with pytest.warns(UserWarning, match=r"adapters \['b', 'c'\] are merged already"):
        runtime.merge_adapter({"b": 0.5, "c": 0.5})
    assert all(torch.equal(parameter, merged[name]) for name, parameter in runtime.model.named_parameters())


def test_a_merge_that_fails_leaves_what_was_merged_before(family):
    runtime = ia3rt.patch(tiny_model(family, torch.float16))
    original = {name: parameter.clone() for name, parameter in runtime.model.named_parameters()}
    last = runtime.sites[-1]
    runtime.add_adapter("fine", {site.key: torch.rand(site.width) for site in runtime.sites})
    runtime.add_adapter(
        "huge",
        {site.key: torch.full((site.width,), 1e7 if site is last else 0.5) for site in runtime.sites},
    )
    runtime.merge_adapter("fine")
    merged = {name: parameter.clone() for name, parameter in runtime.model.named_parameters()}
    with pytest.raises(ValueError, match=f"overflows torch.float16 in '{last.path}'"):
        runtime.merge_adapter("huge")
    assert all(torch.equal(parameter, merged[name]) for name, parameter in runtime.model.named_parameters())
    runtime.unmerge_adapter()
    assert all(torch.equal(parameter, original[name]) for name, parameter in runtime.model.named_parameters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vector_that_became_nan_is_named(family, dtype):
    runtime = ia3rt.patch(tiny_model(family, dtype))
    last = runtime.sites[-1]
    runtime.add_adapter("fine")
    runtime.add_adapter("diverged")
    with torch.no_grad():
        runtime.train_adapter("diverged")[-1][3] = float("nan")
    runtime.end_training()
    before = {name: parameter.clone() for name, parameter in runtime.model.named_parameters()}
    for names in ("diverged", ["fine", "diverged"]):
        with pytest.raises(
            ValueError, match="cannot merge adapter 'diverged', which has become NaN or inf .* at "
        ) as e:
            runtime.merge_adapter(names)
        assert str(last) in str(e.value)
    assert all(torch.equal(parameter, before[name]) for name, parameter in runtime.model.named_parameters())


def test_a_weight_that_is_not_finite_is_not_the_adapters_fault(family):
    model = tiny_model(family)
    runtime = ia3rt.patch(model)
    runtime.add_adapter("b", {site.key: torch.rand(site.width) for site in runtime.sites})
    path = runtime.sites[0].path
    with torch.no_grad():
        model.get_submodule(path).weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=f"'{path}': its own weight or bias holds a NaN or inf"):
        runtime.merge_adapter("b")


def test_a_square_conv1d_is_merged_the_right_way_round(tmp_path):
    given = dict(target_modules=["attn.c_proj"], feedforward_modules=[])
    wrapped = peft_model(tiny_model("gpt2"), "gpt2", "b", **given)
    runtime = ia3rt.patch(tiny_model("gpt2"), **given)
    runtime.load_adapter(save_each(wrapped, tmp_path)[0])
    runtime.merge_adapter("b")
    wrapped.merge_adapter()
    close(runtime, wrapped)


def test_a_model_that_was_moved_while_merged_is_unmerged(family):
    model, plain = tiny_model(family), tiny_model(family)
    runtime = ia3rt.patch(model)
    runtime.add_adapter("b", {site.key: torch.rand(site.width) for site in runtime.sites})
    runtime.merge_adapter("b")
    model.double()
    runtime.unmerge_adapter()
    expected = dict(plain.named_parameters())
    assert all(torch.equal(parameter, expected[name].double()) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("how", ["worn", "named", "merged before", "merged before and named"])
def test_merged_for_good_as_in_peft(pair, how, tmp_path):
    wrapped, runtime = pair
    wrapped.base_model.set_adapter(["b", "c"])
    expected = wrapped.merge_and_unload()
    if how == "worn":
        runtime.set_adapter(["b", "c"])
        merged = runtime.merge_and_unload()
    elif how == "named":
        runtime.set_adapter("d")
        merged = runtime.merge_and_unload(["b", "c"])
    else:
        runtime.set_adapter("d")
        runtime.merge_adapter("b" if "named" in how else ["b", "c"])
        merged = runtime.merge_and_unload("c" if "named" in how else None)
    assert merged is runtime.model and type(merged) is type(expected)
    assert [type(module) for module in merged.modules()] == [type(module) for module in expected.modules()]
    torch.testing.assert_close(merged.state_dict(), expected.state_dict(), rtol=1e-6, atol=1e-7)
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(merged).from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded, IDS), logits(merged, IDS))
    for use in (runtime.unmerge_adapter, runtime.merge_and_unload, runtime.unpatch, lambda: runtime.set_adapter("b")):
        with pytest.raises(RuntimeError, match="not patched any more|not merged"):
            use()
    ia3rt.patch(merged)


def test_nothing_to_merge_is_an_error(pair):
    _, runtime = pair
    for merge in (runtime.merge_and_unload, runtime.merge_adapter, lambda: runtime.merge_adapter(ia3rt.Mix(()))):
        with pytest.raises(ValueError, match="all rows wear the base model: set_adapter"):
            merge()
    runtime.set_adapter("b")  # nothing is merged, so it can be
    runtime.set_adapter(None)
    with runtime.route(["b", "c", None]), pytest.raises(ValueError, match="rows wear different mixes"):
        runtime.merge_and_unload()
    runtime.set_adapter("b")
    assert isinstance(runtime.merge_and_unload(), nn.Module)


def test_a_merge_while_training_is_refused(pair):
    _, runtime = pair
    runtime.train_adapter("b")
    for use in (runtime.merge_adapter, runtime.merge_and_unload):
        with pytest.raises(RuntimeError, match="end_training"):
            use()
    assert isinstance(pair[0], peft.PeftModel)


def test_unmerging_finds_weights_that_a_checkpoint_put_in_their_place():
    model = tiny_model()
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a", {site.key: torch.rand(site.width) for site in runtime.sites})
    runtime.merge_adapter("a")
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    runtime.unmerge_adapter()
    assert torch.equal(logits(model, IDS), logits(tiny_model(), IDS))


def load(model):
    model.load_state_dict({name: tensor + 0.25 for name, tensor in model.state_dict().items()})


def assign(model):
    model.load_state_dict({name: tensor + 0.25 for name, tensor in model.state_dict().items()}, assign=True)


def step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("write", [load, assign, step], ids=lambda write: write.__name__)
def test_weights_that_were_written_while_merged_are_not_mixed_with_those_of_before(write):
    model = tiny_model()
    runtime = ia3rt.patch(model)
    for name in "ab":
        runtime.add_adapter(name, {site.key: torch.rand(site.width) for site in runtime.sites})
    runtime.merge_adapter("a")
    write(model)
    written = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for use in (runtime.unmerge_adapter, runtime.unpatch, lambda: runtime.merge_adapter("b")):
        with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn\.k_proj.*merge_and_unload\(\) without a name"):
            use()
        torch.testing.assert_close(model.state_dict(), written, rtol=0, atol=0)
    worn = logits(model, IDS)
    assert torch.equal(logits(runtime.merge_and_unload(), IDS), worn)
    assert "ia3_runtime" not in vars(model)


def test_a_resize_while_merged_is_told():
    model = tiny_model()
    runtime = ia3rt.patch(model, target_modules=["lm_head", "embed_tokens"])
    runtime.add_adapter("a", {site.key: torch.rand(site.width) for site in runtime.sites})
    runtime.merge_adapter("a")
    model.resize_token_embeddings(model.config.vocab_size + 3)
    resized = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for use in (runtime.unmerge_adapter, runtime.unpatch):
        with pytest.raises(RuntimeError, match="the weights of 'model.embed_tokens', 'lm_head' are not those"):
            use()
    torch.testing.assert_close(runtime.merge_and_unload().state_dict(), resized, rtol=0, atol=0)
    assert logits(model, IDS).shape[-1] == len(resized["lm_head.weight"])


@pytest.mark.parametrize("load", [dict(assign=True), dict()], ids=["assigned", "copied"])
def test_weights_that_are_written_elsewhere_or_as_they_were_merged_stay_so(load):
    model, plain = tiny_model(), tiny_model()
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a", {site.key: torch.rand(site.width) for site in runtime.sites})
    runtime.merge_adapter("a")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] *= 2
    model.load_state_dict(state, **load)
    plain.lm_head.weight.data *= 2
    runtime.unpatch()
    assert torch.equal(logits(model, IDS), logits(plain, IDS))


def test_a_copy_of_a_merged_model_that_was_cast_is_unmerged():
    model = tiny_model()
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a", {site.key: torch.rand(site.width) for site in runtime.sites})
    runtime.merge_adapter("a")
    copied = copy.deepcopy(model.half())
    ia3rt.patch(copied).unpatch()
    torch.testing.assert_close(copied.state_dict(), tiny_model().half().state_dict(), rtol=0, atol=0)
    load(copied_again := copy.deepcopy(model))
    with pytest.raises(RuntimeError, match="are not those"):
        ia3rt.patch(copied_again).unpatch()
