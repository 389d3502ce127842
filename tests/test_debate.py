"""What PEFT's pull request 980 argued about: which ways of combining IA³ adapters agree, and which do not."""

import copy

import pytest
import torch
from tiny import FAMILIES, TARGETS, logits, peft_model, peft_vectors, save_each, scaled, tiny_model, token_ids
from where import TRITON, home

import ia3rt

IDS = token_ids()
NAMES = ["b", "c", "d"]
WEIGHTS = [0.5, 0.3, -0.4]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def case(family, tmp_path):
    """(PEFT model, Runtime, each adapter's float64 vectors by site) over one model."""
    model = tiny_model(family)
    wrapped = peft_model(model, family)
    runtime = ia3rt.patch(model)
    for folder in save_each(wrapped, tmp_path):
        runtime.load_adapter(folder)
    return wrapped, runtime, {name: peft_vectors(wrapped, name) for name in NAMES}


def assert_is_truth(actual, family, scales):
    truth = logits(scaled(tiny_model(family), scales), IDS)
    torch.testing.assert_close(actual.double(), truth, rtol=1e-4, atol=1e-5)


def test_product_is_all_active_at_once_is_merged_is_the_formula(case, family):
    wrapped, runtime, vectors = case
    product = {key: vectors["b"][key] * vectors["c"][key] * vectors["d"][key] for key in vectors["b"]}

    runtime.set_adapter(NAMES)
    active = logits(runtime.model, IDS)
    runtime.add_weighted_adapter(NAMES, None, "together")
    runtime.set_adapter("together")
    combined = logits(runtime.model, IDS)
    runtime.set_adapter(NAMES)
    runtime.merge_adapter()
    merged = logits(runtime.model, IDS)
    runtime.unmerge_adapter()

    wrapped.base_model.set_adapter(NAMES)
    assert torch.equal(active, logits(wrapped, IDS))
    assert torch.equal(active, combined)
    torch.testing.assert_close(merged, active, rtol=1e-4, atol=1e-5)
    assert_is_truth(active, family, product)
    assert_is_truth(merged, family, product)


def test_linear_is_another_thing_and_is_its_formula(case, family):
    wrapped, runtime, vectors = case
    linear = {key: sum(w * vectors[n][key] for n, w in zip(NAMES, WEIGHTS, strict=True)) for key in vectors["b"]}

    runtime.set_adapter(dict(zip(NAMES, WEIGHTS, strict=True)))
    active = logits(runtime.model, IDS)
    runtime.add_weighted_adapter(NAMES, WEIGHTS, "sum", combination_type="linear")
    runtime.set_adapter("sum")
    combined = logits(runtime.model, IDS)
    runtime.merge_adapter()
    merged = logits(runtime.model, IDS)
    runtime.unmerge_adapter()
    runtime.set_adapter(NAMES)

    assert torch.equal(active, combined)
    assert_is_truth(active, family, linear)
    assert_is_truth(merged, family, linear)
    assert (active - logits(runtime.model, IDS)).abs().max() > 0.1


def test_delta_is_its_formula(case, family):
    wrapped, runtime, vectors = case
    delta = {
        key: 1 + sum(w * (vectors[n][key] - 1) for n, w in zip(NAMES, WEIGHTS, strict=True)) for key in vectors["b"]
    }
    runtime.set_adapter(ia3rt.Mix(NAMES, WEIGHTS, "delta"))
    assert_is_truth(logits(runtime.model, IDS), family, delta)


def test_a_product_with_unit_weights_is_a_product_and_with_others_is_refused(case):
    _, runtime, _ = case
    runtime.add_weighted_adapter(NAMES, [1, 1, 1], "together")
    with pytest.raises(ValueError, match="order of factors does not matter"):
        runtime.add_weighted_adapter(NAMES, WEIGHTS, "weighted")


def test_adapters_whose_target_modules_differ_in_type_and_layers_combine(family, tmp_path):
    """List, set and regular expression; all layers, the first, the last: PEFT refuses to combine these."""
    target, feedforward = TARGETS[family]["target_modules"], TARGETS[family]["feedforward_modules"]
    out_name, in_name = target[0], feedforward[0].replace(".", r"\.")
    configs = {
        "b": {},
        "c": dict(target_modules=rf".*\.0\..*({out_name}|{in_name})", feedforward_modules=rf".*{in_name}"),
        "d": dict(target_modules={out_name}, feedforward_modules=set()),
        "e": dict(target_modules=rf".*\.1\..*{in_name}", feedforward_modules=rf".*\.1\..*{in_name}"),
    }
    model = tiny_model(family)
    runtime = ia3rt.patch(model)
    vectors = {}
    for name, config in configs.items():
        wrapped = peft_model(model, family, name, **copy.deepcopy(config))
        runtime.load_adapter(save_each(wrapped, tmp_path)[0], name)
        vectors[name] = peft_vectors(wrapped, name)
    assert len({frozenset(v) for v in vectors.values()}) == 4, "the adapters have to differ in their layers"

    def one(key):
        return torch.ones(next(v[key] for v in vectors.values() if key in v).shape, dtype=torch.float64)

    keys = set().union(*vectors.values())
    product, linear = {}, {}
    for key in keys:
        columns = [vectors[name].get(key, one(key)) for name in configs]
        product[key] = torch.stack(columns).prod(0)
        linear[key] = sum(weight * column for weight, column in zip([0.4, 0.3, 0.2, -0.6], columns, strict=True))
    runtime.set_adapter(list(configs))
    assert_is_truth(logits(model, IDS), family, product)
    runtime.add_weighted_adapter(list(configs), [0.4, 0.3, 0.2, -0.6], "sum", "linear")
    runtime.set_adapter("sum")
    assert_is_truth(logits(model, IDS), family, linear)


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_a_sum_leaves_the_sites_where_no_adapter_of_it_acts(backend):
    """Whatever its weights sum to, merged or not, and whichever sites other adapters bring."""
    down, value, query = (
        f"model.layers.0.{name}" for name in ("mlp.down_proj", "self_attn.v_proj", "self_attn.q_proj")
    )
    runtime = ia3rt.patch(tiny_model().to(home(backend)), capacity=2, backend=backend)
    vectors = {"b": torch.rand(96), "c": torch.rand(96)}
    for name, vector in vectors.items():
        runtime.add_adapter(name, {down: vector})
    weights = {"b": 0.5, "c": 0.3}
    truth = {(down, "in"): sum(weight * vectors[name].double() for name, weight in weights.items())}

    runtime.set_adapter(weights)
    assert_is_truth(logits(runtime.model, IDS), "llama", truth)
    runtime.add_adapter("d", {value: torch.rand(32), (query, "out"): torch.rand(64)})
    assert_is_truth(logits(runtime.model, IDS), "llama", truth)
    runtime.set_adapter(weights)
    assert_is_truth(logits(runtime.model, IDS), "llama", truth)
    runtime.add_weighted_adapter(list(weights), list(weights.values()), "sum", "linear")
    runtime.set_adapter("sum")
    assert_is_truth(logits(runtime.model, IDS), "llama", truth)
    runtime.merge_adapter(weights)
    assert_is_truth(logits(runtime.model, IDS), "llama", truth)
    runtime.unmerge_adapter()

    both = {**weights, "d": -0.4}
    with runtime.route([both, None, weights]):
        mixed = logits(runtime.model, IDS)
    runtime.set_adapter(weights)
    torch.testing.assert_close(mixed[2], logits(runtime.model, IDS)[2], rtol=1e-4, atol=1e-5)
