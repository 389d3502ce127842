"""A deep copy of a patched model is a patched model of its own: patch() gives its Runtime."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, generated, logits, patched, tiny_model, token_ids
from torch import nn

import ia3rt

IDS = token_ids()


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def runtime(family):
    runtime = ia3rt.patch(tiny_model(family))
    for name in "ab":
        runtime.add_adapter(name, {site.key: torch.rand(site.width) for site in runtime.sites})
    runtime.set_adapter("a")
    return runtime


def test_it_wears_what_the_original_wore_and_neither_changes_the_other(runtime, family):
    model, base = runtime.model, logits(tiny_model(family), IDS)
    a = logits(model, IDS)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, IDS), a)
    other = ia3rt.patch(copied)
    assert other is not runtime and other.model is copied
    assert (other.adapters, other.active_adapters) == (["a", "b"], ["a"])
    other.set_adapter("b")
    b = logits(copied, IDS)
    assert torch.equal(logits(model, IDS), a)
    runtime.set_adapter("b")
    assert torch.equal(logits(model, IDS), b)
    other.delete_adapter("a")
    other.add_adapter("c", {site.key: torch.rand(site.width) for site in other.sites})
    other.set_adapter("c")
    with runtime.route(["a", "b", None]):
        mixed = logits(model, IDS)
    torch.testing.assert_close(mixed, torch.stack([a[0], b[1], base[2]]), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model, IDS), b)
    generated(copied, IDS, torch.ones_like(IDS), max_new_tokens=2, num_beams=2)
    other.merge_adapter()
    assert torch.equal(logits(model, IDS), b)
    other.unpatch()
    assert torch.equal(logits(copied, IDS), base)
    assert torch.equal(logits(model, IDS), b)
    runtime.unpatch()
    for each in (model, copied):
        assert not [key for module in each.modules() for key in vars(module) if key.startswith("ia3")]
        assert not each._forward_hooks and not each._forward_pre_hooks
        ia3rt.patch(each)


def test_a_copy_of_a_copy(runtime):
    first = copy.deepcopy(runtime.model)
    second = copy.deepcopy(first)
    one, two = ia3rt.patch(first), ia3rt.patch(second)
    two.set_adapter("b")
    assert torch.equal(logits(first, IDS), logits(runtime.model, IDS))
    one.set_adapter("b")
    assert torch.equal(logits(first, IDS), logits(second, IDS))


def test_a_merged_original_has_a_merged_copy(runtime, family):
    runtime.merge_adapter()
    copied = copy.deepcopy(runtime.model)
    other = ia3rt.patch(copied)
    other.unmerge_adapter()
    assert torch.equal(
        other.unpatch().state_dict()["lm_head.weight"], tiny_model(family).state_dict()["lm_head.weight"]
    )
    assert all(map(torch.equal, copied.parameters(), tiny_model(family).parameters()))


def test_a_copy_of_a_merged_model_wears_after_it_what_the_original_does(runtime):
    a = logits(runtime.model, IDS)
    runtime.merge_adapter()
    copied = copy.deepcopy(runtime.model)
    other = ia3rt.patch(copied)
    assert torch.equal(logits(copied, IDS), logits(runtime.model, IDS))
    other.unmerge_adapter()
    assert other.active_adapters == ["a"]
    assert torch.equal(logits(copied, IDS), a)


def test_the_model_itself_and_a_copied_runtimes_are_patched_already(runtime):
    copied = copy.deepcopy(runtime)
    claimed = copy.deepcopy(runtime.model)
    ia3rt.patch(claimed)
    for model in (runtime.model, copied.model, claimed):
        with pytest.raises(ValueError, match="patched already"):
            ia3rt.patch(model)


def test_a_copy_cannot_be_patched_otherwise(runtime):
    copied = copy.deepcopy(runtime.model)
    for arguments in (dict(dtype=torch.bfloat16), dict(target_modules="all-linear"), dict(capacity=99)):
        with pytest.raises(ValueError, match=r"a copy of a patched one.*without further arguments gives its Runtime"):
            ia3rt.patch(copied, **arguments)
    plain = ia3rt.patch(copied).unpatch()
    ia3rt.patch(plain, target_modules="all-linear")


def test_a_copy_of_a_part_is_plain():
    """Of which no Runtime says what it wears: a block repeated to make a model deeper, a frozen copy of the trunk."""
    model = tiny_model()
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a", {site.key: torch.rand(site.width) for site in runtime.sites})
    runtime.set_adapter("a")
    runtime.train_adapter("a")
    with pytest.warns(UserWarning, match=r"a part of a patched model, with a \w+ that wears adapters") as warned:
        block, trunk = copy.deepcopy(model.model.layers[0]), copy.deepcopy(model.model)
    assert [Path(each.filename).name for each in warned] == [Path(__file__).name] * 2, "one of each, of who copies"
    assert not any(type(module).__name__.startswith("IA3") for part in (block, trunk) for module in part.modules())
    assert not any("ia3" in name for part in (block, trunk) for name, _ in part.named_parameters())
    with torch.no_grad():
        assert torch.equal(trunk(IDS)[0], tiny_model().model(IDS)[0])
    runtime.end_training()
    before = logits(model, IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(copy.deepcopy(model), IDS), before)


@pytest.mark.parametrize("path", ["model.layers.0", "model", "lm_head"])
@pytest.mark.filterwarnings("ignore:a part of a patched model")
def test_a_part_that_is_copied_before_its_model_is_an_error_and_after_it_a_part_of_the_copy(path):
    model = tiny_model()
    runtime = patched(model)
    runtime.add_adapter("head", modules={"lm_head": {"weight": 2 * model.lm_head.weight.detach()}})
    runtime.set_adapter(["a", "head"])
    holder = nn.ModuleList([model.get_submodule(path), model])
    before = logits(model, IDS)
    with pytest.raises(ValueError, match="a part of a patched model is copied before the model itself"):
        copy.deepcopy(holder)
    memo: dict[int, object] = {}
    copied = copy.deepcopy(model, memo)
    part, whole = copy.deepcopy(holder, memo)
    assert whole is copied and part is copied.get_submodule(path)
    ia3rt.patch(copied).set_adapter("b")
    assert torch.equal(logits(model, IDS), before)
    runtime.set_adapter("b")
    assert torch.equal(logits(copied, IDS), logits(model, IDS))


OWN = {"a head": "lm_head", "a layer that wears vectors": "model.layers.0.mlp.down_proj", "a block": "model.layers.0"}


@pytest.mark.parametrize("training", [False, True], ids=["worn", "trained"])
@pytest.mark.parametrize("path", OWN.values(), ids=OWN)
def test_a_copy_of_a_part_with_an_own_module_is_plain(path, training):
    """The part is such a module, or holds one; the truth is the model before it was patched."""
    torch.manual_seed(0)
    model, plain = tiny_model(), tiny_model()
    runtime = patched(model, "b")
    state = {name: tensor + 1 for name, tensor in plain.get_submodule(path).state_dict().items()}
    vectors = {site.key: torch.rand(site.width) for site in runtime.sites if not site.path.startswith(path)}
    runtime.add_adapter("a", vectors, modules={path: state})
    runtime.set_adapter("a")
    if training:
        runtime.train_adapter("a")
    during, outer = logits(model, IDS), path.rpartition(".")[0]
    with pytest.warns(UserWarning, match=r"a part of a patched model, with a \w+ that wears adapters") as warned:
        parts = {path: copy.deepcopy(model.get_submodule(path))}
        if outer:
            parts[outer] = copy.deepcopy(model.get_submodule(outer))
    assert [Path(each.filename).name for each in warned] == [Path(__file__).name] * len(parts)

    def assert_plain():
        for part, copied in parts.items():
            truth = plain.get_submodule(part)
            assert [(name, type(each)) for name, each in copied.named_modules()] == [
                (name, type(each)) for name, each in truth.named_modules()
            ]
            assert not [key for each in copied.modules() for key in vars(each) if key.startswith("ia3_")]
            assert copied.state_dict().keys() == truth.state_dict().keys()
            assert all(map(torch.equal, copied.state_dict().values(), truth.state_dict().values()))
            for name, parameter in copied.named_parameters():
                found = copied.get_submodule(name.rpartition(".")[0])
                assert getattr(found, name.rpartition(".")[2]) is parameter
            if isinstance(copied, nn.Linear):
                x = torch.randn(2, copied.in_features)
                assert torch.equal(copied(x), truth(x))

    assert_plain()
    assert torch.equal(logits(model, IDS), during)
    if training:
        runtime.end_training()
    runtime.set_adapter("b")
    assert_plain()
    runtime.set_adapter("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = copy.deepcopy(model)
    assert torch.equal(logits(whole, IDS), during)
    ia3rt.patch(whole).delete_adapter("a")
    assert torch.equal(logits(model, IDS), during)
    runtime.unpatch()
    assert_plain()


def test_a_copy_of_a_module_of_which_no_adapter_has_its_own_any_more_is_plain():
    model = tiny_model()
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a", modules={"lm_head": model.lm_head.state_dict()})
    runtime.delete_adapter("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied = copy.deepcopy(model.lm_head)
    assert type(copied) is nn.Linear
    runtime.add_adapter("a", modules={"lm_head": copied.state_dict()})
