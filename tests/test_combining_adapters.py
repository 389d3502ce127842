"""add_weighted_adapter: every way of combining on models, beside PEFT's functions and a float64 model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import merge_utils
from tiny import FAMILIES, logits, peft_model, save_each, scaled, tiny_model, token_ids
from torch import Tensor

import ia3rt
from ia3rt.adapters.combining.pruning import keep_random

IDS = token_ids()
Vectors = dict[tuple[str, str], Tensor]

WEIGHTS = torch.tensor([0.7, -0.4], dtype=torch.float64)
TOTAL = dict(combination_type="ties", density=0.3)
# By what is asked: what it makes of two float64 task vectors; `keep` draws as dare does there.
EXPECTED: dict[str, tuple[dict[str, Any], Callable[[list[Tensor], Callable[[Tensor, int], Tensor]], Tensor]]] = {
    "ties": (TOTAL, lambda t, keep: merge_utils.ties(t, WEIGHTS, 0.3, "total")),
    "ties by frequency": (
        {**TOTAL, "majority_sign_method": "frequency"},
        lambda t, keep: merge_utils.ties(t, WEIGHTS, 0.3, "frequency"),
    ),
    "magnitude_prune": (
        {**TOTAL, "combination_type": "magnitude_prune"},
        lambda t, keep: merge_utils.magnitude_prune(t, WEIGHTS, 0.3),
    ),
    "dare_linear": (
        {**TOTAL, "combination_type": "dare_linear", "seed": 5},
        lambda t, keep: merge_utils.task_arithmetic([keep(each, i) for i, each in enumerate(t)], WEIGHTS),
    ),
    "dare_ties": (
        {**TOTAL, "combination_type": "dare_ties", "seed": 5},
        lambda t, keep: merge_utils.ties([keep(each, i) for i, each in enumerate(t)], WEIGHTS, 1.0, "total"),
    ),
    "max_abs": (
        {"combination_type": "max_abs"},
        lambda t, keep: torch.where((0.7 * t[0]).abs() >= (0.4 * t[1]).abs(), 0.7 * t[0], -0.4 * t[1]),
    ),
    "delta, normalized": (
        {"combination_type": "delta", "normalize": True},
        lambda t, keep: (0.7 * t[0] - 0.4 * t[1]) / 0.3,
    ),
    "linear, normalized": (
        {"combination_type": "linear", "normalize": True},
        lambda t, keep: (0.7 * t[0] - 0.4 * t[1]) / 0.3,  # the ones sum to 1
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def loaded(family: str, tmp_path: Path) -> tuple[ia3rt.Runtime, dict[str, Vectors]]:
    """b acts everywhere; c by a pattern, where PEFT takes names, in one layer only, and at the queries besides."""
    model = tiny_model(family)
    one = (
        r".*layers\.1\.(self_attn\.[qk]_proj|mlp\.down_proj)"
        if family == "llama"
        else r".*h\.1\.(attn\.c_attn|mlp\.c_fc)"
    )
    feedforward = r".*down_proj" if family == "llama" else []
    wholes = peft_model(model, family, "b")
    part = peft_model(model, family, "c", target_modules=one, feedforward_modules=feedforward)
    runtime = ia3rt.patch(model)
    vectors = {}
    for name, wrapped in (("b", wholes), ("c", part)):
        for layer in wrapped.modules():
            if hasattr(layer, "ia3_l"):
                for vector in layer.ia3_l.values():
                    vector.data += 0.01 * torch.rand(vector.shape)  # that no two magnitudes are alike
        (folder,) = save_each(wrapped, tmp_path / name)
        runtime.load_adapter(folder, name)
        vectors[name] = {
            (path, "in" if layer.is_feedforward else "out"): layer.ia3_l[name].detach().double().flatten()
            for path, layer in wrapped.get_base_model().named_modules()
            if hasattr(layer, "ia3_l")
        }
    return runtime, vectors


def changes(vectors: dict[str, Vectors], names: str = "bc") -> dict[tuple[str, str], list[Tensor]]:
    """Task vectors at each site where one of the adapters acts."""
    sites = dict.fromkeys(key for name in names for key in vectors[name])
    width = {key: len(vector) for each in vectors.values() for key, vector in each.items()}
    ones = {key: torch.ones(width[key], dtype=torch.float64) for key in sites}
    return {key: [vectors[name].get(key, ones[key]) - 1 for name in names] for key in sites}


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("case", EXPECTED)
def test_what_it_makes_is_pefts_and_peft_loads_it(
    case: str, family: str, loaded: tuple[ia3rt.Runtime, dict[str, Vectors]], tmp_path: Path
) -> None:
    runtime, vectors = loaded
    options, formula = EXPECTED[case]
    runtime.add_weighted_adapter(["b", "c"], WEIGHTS.tolist(), "new", **options)
    right = {}
    for (path, side), task in changes(vectors).items():

        def keep(change: Tensor, place: int, path: str = path, side: str = side) -> Tensor:
            return keep_random(change, 0.3, f"5:{place}:{side}:{path}")

        right[path, side] = 1 + formula(task, keep)
    made = runtime.get_adapter("new").vectors
    assert made.keys() == right.keys()
    for key, vector in made.items():
        torch.testing.assert_close(vector, right[key].float(), rtol=1e-6, atol=1e-6)
    runtime.set_adapter("new")
    worn = logits(runtime.model, IDS)
    truth = logits(scaled(tiny_model(family), right), IDS)
    torch.testing.assert_close(worn.double(), truth, rtol=1e-4, atol=1e-4)
    assert (truth - logits(tiny_model(family), IDS)).abs().max() > 1e-2, "else nothing was seen"
    runtime.save_adapter("new", tmp_path / "new")
    loads = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "new")
    assert torch.equal(logits(loads, IDS), worn)


OTHERS: dict[str, tuple[str, list[float] | None, dict[str, Any], Callable[[list[Tensor]], Tensor]]] = {
    "negate": ("b", None, {}, lambda t: 1 - t[0]),
    "negate in part": ("c", [0.5], {"combination_type": "negate"}, lambda t: 1 - 0.5 * t[0]),
    "analogy": ("bcb", None, {}, lambda t: 1 + t[2] + t[1] - t[0]),
    "weights of one each": ("bc", None, {"combination_type": "max_abs"}, lambda t: 1 + _stronger(*t)),
}


def _stronger(one: Tensor, other: Tensor) -> Tensor:
    return torch.where(one.abs() >= other.abs(), one, other)


@pytest.mark.parametrize("case", OTHERS)
def test_what_takes_other_adapters_or_no_weights(case: str, loaded: tuple[ia3rt.Runtime, dict[str, Vectors]]) -> None:
    runtime, vectors = loaded
    names, weights, options, formula = OTHERS[case]
    runtime.add_weighted_adapter(list(names), weights, "new", **{"combination_type": case, **options})
    right = {key: formula(task) for key, task in changes(vectors, names).items()}
    made = runtime.get_adapter("new").vectors
    assert made.keys() == right.keys()
    for key, vector in made.items():
        torch.testing.assert_close(vector, right[key].float(), rtol=1e-6, atol=1e-6)


def patched(**vectors: list[float]) -> ia3rt.Runtime:
    """Adapters at one linear layer's output."""
    runtime = ia3rt.patch(torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 4)))
    for name, each in vectors.items():
        runtime.add_adapter(name, {("0", "out"): torch.tensor(each)})
    return runtime


def made(runtime: ia3rt.Runtime, *arguments: Any, **options: Any) -> list[float]:
    runtime.add_weighted_adapter(*arguments, **options)
    return runtime.get_adapter(arguments[2]).vectors["0", "out"].tolist()


def test_power_slerp_and_fisher() -> None:
    runtime = patched(a=[4.0, 1.0, -1.0, 0.0], b=[9.0, 1.0, -4.0, 0.0])
    assert made(runtime, ["a", "b"], [0.5, 0.5], "mean", "power") == pytest.approx([6, 1, -2, 0])
    assert made(runtime, ["a", "b"], [1, 1], "mean normalized", "power", normalize=True) == pytest.approx([6, 1, -2, 0])
    runtime.add_adapter("x", {("0", "out"): torch.tensor([2.0, 1.0, 1.0, 1.0])})
    runtime.add_adapter("y", {("0", "out"): torch.tensor([1.0, 2.0, 1.0, 1.0])})
    assert made(runtime, ["x", "y"], [0.5, 0.5], "arc", "slerp") == pytest.approx([1 + 0.5**0.5, 1 + 0.5**0.5, 1, 1])
    importances = {"a": {"0": torch.tensor([1.0, 1, 3, 0])}, "b": {("0", "out"): torch.tensor([[3.0], [1], [0], [0]])}}
    weighed = made(runtime, ["a", "b"], None, "fisher", "fisher", importances=importances)
    assert weighed == pytest.approx([(4 + 27) / 4, 1, -1, 0])


def test_adapters_that_are_trained_are_combined_as_they_are_now() -> None:
    runtime = patched(a=[1.0, 1.0, 1.0, 1.0])
    (vector,) = runtime.train_adapter("a")
    with torch.no_grad():
        vector.copy_(torch.tensor([2.0, 0.5, 1.0, 3.0]))
    assert made(runtime, ["a"], None, "minus", "negate") == [0.0, 1.5, 1.0, -1.0]
    assert vector.requires_grad and "minus" in runtime.adapters


def test_a_seed_decides_and_none_is_0() -> None:
    runtime = ia3rt.patch(tiny_model())
    runtime.add_adapter("a", {site.key: torch.linspace(0, 2, site.width) for site in runtime.sites})

    def drawn(name: str, seed: int | None) -> list[Tensor]:
        runtime.add_weighted_adapter(["a", "a"], [0.5, 0.5], name, "dare_linear", density=0.5, seed=seed)
        return list(runtime.get_adapter(name).vectors.values())

    first, again, other, zero, unsaid = (drawn(f"{i}", s) for i, s in enumerate((1, 1, 2, 0, None)))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert all(map(torch.equal, zero, unsaid))
    levels = set((first[0] - 1)[: len(first[0]) // 3].sign().tolist())
    assert levels == {0.0, -1.0}
    half = (first[0] - 1) / (torch.linspace(0, 2, len(first[0])) - 1)
    assert {0.0, 1.0, 2.0} == set(half.round(decimals=4).tolist()), "one adapter twice is drawn twice"


def test_a_seed_is_an_integer() -> None:
    with pytest.raises(TypeError, match="integer"):
        patched(a=[2.0, 1.0, 1.0, 1.0]).add_weighted_adapter(["a"], None, "n", "dare_linear", density=0.5, seed=0.5)


def test_slices_stay_slices_and_density_counts_the_whole_site() -> None:
    model = tiny_model("gpt2")
    runtime = ia3rt.patch(model, target_modules={"c_attn": ("k", "v")})
    (site, *_) = runtime.sites
    inside = site.slices.inside()
    for name, start in (("a", 0.5), ("b", 3.0)):
        vector = torch.ones(site.width)
        vector[inside] = torch.linspace(start, 2.1, len(inside))
        runtime.add_adapter(name, {site.key: vector})
    for kind in ("ties", "dare_ties", "max_abs", "slerp"):
        options = {"density": 0.5} if "ties" in kind else {}
        runtime.add_weighted_adapter(["a", "b"], [0.4, 0.6], kind, kind, **options)
        vector = runtime.get_adapter(kind).vectors[site.key]
        outside = site.slices.outside(site.width)
        assert (vector[outside] == 1).all() and (vector[inside] != 1).any(), kind
    runtime.add_weighted_adapter(["a"], None, "pruned", "magnitude_prune", density=0.25)
    assert (runtime.get_adapter("pruned").vectors[site.key] != 1).sum() == site.width // 4


def _with_head(runtime: ia3rt.Runtime) -> None:
    runtime.add_adapter("h", {("0", "out"): torch.full((4,), 2.0)}, modules={"1": _head()})


def _head() -> dict[str, Tensor]:
    return {"weight": torch.eye(4), "bias": torch.zeros(4)}


def test_an_own_module_comes_along_as_it_is() -> None:
    runtime = patched(a=[1.5, 1.0, 1.0, 0.5])
    _with_head(runtime)
    runtime.add_weighted_adapter(["a", "h"], [0.5, 0.5], "new", "ties", density=1.0)
    new = runtime.get_adapter("new")
    assert {name: x.tolist() for name, x in new.modules["1"].items()} == {n: x.tolist() for n, x in _head().items()}
    runtime.set_adapter("new")
    x = torch.rand(3, 2)
    hidden = torch.nn.functional.linear(x, runtime.model[0].weight, runtime.model[0].bias)
    torch.testing.assert_close(runtime.model(x), hidden * new.vectors["0"])


def numbers(runtime: ia3rt.Runtime) -> dict[str, dict[Any, list[float]]]:
    """All adapters' vectors."""
    return {n: {k: v.tolist() for k, v in runtime.get_adapter(n).vectors.items()} for n in runtime.adapters}


REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "density of 0": ((["a", "b"], None, "n", "ties"), {"density": 0}, r"density is 0: it is the share .* \(0, 1\]"),
    "density above 1": ((["a", "b"], None, "n", "dare_ties"), {"density": 1.5}, "density is 1.5"),
    "no density": ((["a", "b"], None, "n", "dare_linear"), {}, "'dare_linear' needs a density"),
    "NaN density": ((["a", "b"], None, "n", "ties"), {"density": float("nan")}, "density is nan"),
    "density keeps nothing": (
        (["a", "b"], None, "n", "ties"),
        {"density": 0.2},
        r"ties of a and b is not possible at 0 \(output, width 4\): a density of 0.2 keeps none of 4 numbers",
    ),
    "density of what prunes nothing": ((["a"], None, "n", "negate"), {"density": 0.5}, "'negate' takes no density"),
    "seed of ties": ((["a"], None, "n", "ties"), {"density": 0.5, "seed": 1}, "'ties' takes no seed"),
    "normalized product": ((["a"], None, "n"), {"normalize": True}, "'product' takes no normalize"),
    "frequency of power": (
        (["a"], [1], "n", "power"),
        {"majority_sign_method": "frequency"},
        "'power' takes no majority_sign_method",
    ),
    "another sign method": (
        (["a"], [1], "n", "ties"),
        {"density": 0.5, "majority_sign_method": "sum"},
        "unknown majority_sign_method 'sum': use 'total' or 'frequency'",
    ),
    "another type": ((["a"], [1], "n", "svd"), {}, "unknown combination_type 'svd': use one of 'product', .*'slerp'"),
    "weights that do not fit": (
        (["a", "b"], [1], "n", "ties"),
        {"density": 0.5},
        r"1 weights for 2 adapters \['a', 'b'\]",
    ),
    "an infinite weight": ((["a"], [float("inf")], "n", "power"), {}, "weight of adapter 'a' is inf"),
    "weights that sum to 0": (
        (["a", "b"], [1, -1], "n", "delta"),
        {"normalize": True},
        r"weights \[1.0, -1.0\] sum to 0, and cannot be normalized",
    ),
    "delta of one without its weight": ((["a"], None, "n", "delta"), {}, "'delta' of one adapter needs its weight"),
    "linear without weights": ((["a", "b"], None, "n", "linear"), {}, "a linear mix needs weights"),
    "slerp of three": ((["a", "b", "c"], [0, 0, 1], "n", "slerp"), {}, "'slerp' is of two adapters: got 3"),
    "slerp past its end": ((["a", "b"], [0.5, 0.6], "n", "slerp"), {}, r"needs the weights \(1 - t, t\), .* got"),
    "slerp of opposites": (
        (["a", "c"], [0.5, 0.5], "n", "slerp"),
        {},
        r"slerp of a and c is not possible at 0 \(output, width 4\): the two changes are opposite",
    ),
    "analogy of two": ((["a", "b"], None, "n", "analogy"), {}, "'analogy' is of A, B and C of A : B = C : D: got 2"),
    "negation of two": ((["a", "b"], None, "n", "negate"), {}, "'negate' is of one adapter: got 2"),
    "signs": (
        (["a", "b"], None, "n", "power"),
        {},
        r"power of a and b is not possible at 0 \(output, width 4\): 1 of 4 numbers have different signs, .* 3: ",
    ),
    "too large": ((["b"], [90], "n", "power"), {}, r"power of b is too large for float32 at 0 \(output, width 4\)"),
    "too large a sum": (
        (["b"], [1e36], "n", "linear"),
        {},
        r"linear of b is too large for float32 at 0 .*: give smaller",
    ),
    "importances of ties": (
        (["a"], None, "n", "ties"),
        {"density": 1, "importances": {}},
        "'ties' takes no importances",
    ),
    "importances of a product": ((["a"], None, "n"), {"importances": {}}, "'product' takes no importances"),
    "no importances": ((["a", "b"], None, "n", "fisher"), {}, "'fisher' needs importances"),
    "importances of one": (
        (["a", "b"], None, "n", "fisher"),
        {"importances": {"a": {"0": torch.ones(4)}}},
        r"adapter 'b' has no importances at 0 \(output, width 4\)",
    ),
    "importances of a stranger": (
        (["a"], None, "n", "fisher"),
        {"importances": {"a": {"0": torch.ones(4)}, "z": {}}},
        r"importances are given for \['z'\]",
    ),
    "importances of another width": (
        (["a"], None, "n", "fisher"),
        {"importances": {"a": {"0": torch.ones(3)}}},
        r"adapter 'a' has importances of shape \(3,\) at 0 .*: expected 4 numbers",
    ),
    "negative importances": (
        (["a"], None, "n", "fisher"),
        {"importances": {"a": {"0": -torch.ones(4)}}},
        "adapter 'a' has importances at 0 .* that are negative, NaN or inf",
    ),
    "importances elsewhere": (
        (["a"], None, "n", "fisher"),
        {"importances": {"a": {("0", "out"): torch.ones(4), ("1", "out"): torch.ones(4)}}},
        "importances are given for .*'1', 'out'.* of adapter 'a', which does not act there",
    ),
    "a negative weight of an average": (
        (["a", "b"], [1, -0.5], "n", "fisher"),
        {"importances": {}},
        "'fisher' is an average: weights are 0 or more",
    ),
    "an own module negated": ((["h"], None, "n", "negate"), {}, r"adapter 'h' has its own \['1'\], which negate of h"),
    "two own modules": ((["h", "g"], None, "n", "max_abs"), {}, "'h' and 'g' each have their own module '1'"),
    "unknown": ((["a", "x"], None, "n", "max_abs"), {}, "unknown adapter 'x'"),
    "a name that is taken": ((["a", "b"], None, "c", "max_abs"), {}, "an adapter named 'c' is already loaded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_nothing(case: str) -> None:
    runtime = patched(a=[2.0, 1.5, 0.0, 3.0], b=[6e5, 1.0, 1.0, -2.0], c=[0.0, 0.5, 2.0, -1.0])
    _with_head(runtime)
    runtime.add_adapter("g", {("0", "out"): torch.full((4,), 3.0)}, modules={"1": _head()})
    runtime.set_adapter("a")
    arguments, options, message = REFUSED[case]
    x = torch.rand(2, 2)
    before, held = runtime.model(x), numbers(runtime)
    with pytest.raises(ValueError, match=message):
        runtime.add_weighted_adapter(*arguments, **options)
    assert numbers(runtime) == held
    assert torch.equal(runtime.model(x), before)
    made(runtime, ["a", "b"], None, "n", "max_abs")  # and goes on


def test_experts_that_share_a_vector_and_experts_that_have_one_each(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    runtime = ia3rt.patch(MixtralForCausalLM(config))
    key = next(site.key for site in runtime.sites if site.experts)
    each, one = torch.rand(3, 12) + 1, torch.rand(12)
    runtime.add_adapter("each", {key: each})
    runtime.add_adapter("one", {key: one})
    runtime.add_weighted_adapter(["each", "one"], None, "both", "max_abs")
    runtime.add_weighted_adapter(["one"], None, "minus", "negate")
    right = 1 + _stronger(each - 1, (one - 1).expand(3, 12))
    torch.testing.assert_close(runtime.get_adapter("both").vectors[key], right)
    torch.testing.assert_close(runtime.get_adapter("minus").vectors[key], 2 - one)
    runtime.add_weighted_adapter({"one": 0.5, "minus": 0.2}, None, "sum", "delta")
    torch.testing.assert_close(runtime.get_adapter("sum").vectors[key], 1 + 0.3 * (one - 1))
    runtime.save_adapter("minus", tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "IA3"


def test_a_mapping_gives_weights() -> None:
    runtime = patched(a=[2.0, 1.5, 0.0, 3.0], b=[1.0, 1.0, 3.0, -2.0])
    made(runtime, ["a", "b"], [0.1, 0.9], "one", "max_abs")
    runtime.add_weighted_adapter({"a": 0.1, "b": 0.9}, None, "other", "max_abs")
    one, other = (runtime.get_adapter(name).vectors for name in ("one", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(ValueError, match="have weights already"):
        runtime.add_weighted_adapter({"a": 0.1, "b": 0.9}, [1.0, 1.0], "third", "max_abs")


def test_the_task_is_what_all_say_or_those_with_a_head() -> None:
    runtime = patched()
    ones = {("0", "out"): torch.ones(4)}
    for name, task in {"x": "CAUSAL_LM", "y": "CAUSAL_LM", "z": None}.items():
        runtime.add_adapter(name, ones, {"task_type": task, "target_modules": ["0"]})
    runtime.add_adapter("h", ones, {"task_type": "SEQ_CLS"}, modules={"1": _head()})
    for names, task in ((["x", "y"], "CAUSAL_LM"), (["x", "z"], None), (["x", "h"], "SEQ_CLS")):
        runtime.add_weighted_adapter(names, None, "made", "max_abs")
        config = runtime.get_adapter("made").config
        assert config.get("task_type") == task and "target_modules" not in config
        runtime.delete_adapter("made")
