"""Each way of combining: against its paper's definition, number by number in Python's floats, and against PEFT's."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from ia3rt.adapters.combining.arithmetic import analogy, negate
from ia3rt.adapters.combining.combination import Combination
from ia3rt.adapters.combining.fisher import fisher
from ia3rt.adapters.combining.max_abs import max_abs
from ia3rt.adapters.combining.power import power
from ia3rt.adapters.combining.pruned_sums import dare_linear, magnitude_prune
from ia3rt.adapters.combining.pruning import keep_largest, keep_random
from ia3rt.adapters.combining.slerp import slerp
from ia3rt.adapters.combining.ties import dare_ties, ties

WIDTH = 50
WEIGHTS = [0.7, -0.4, 1.3]
DENSITIES = [0.02, 0.2, 0.29, 0.5, 0.98, 1.0]
Numbers = list[float]


def some(count: int = 3, width: int = WIDTH, dtype: torch.dtype = torch.float32, low: float = -1.0) -> list[Tensor]:
    """Vectors around 1, some of their numbers exactly 1 and some 0."""
    generator = torch.Generator().manual_seed(count)
    vectors = torch.empty(count, width).uniform_(low, 3.0, generator=generator)
    chance = torch.rand(count, width, generator=generator)
    vectors[chance < 0.1] = 1.0
    vectors[chance > 0.95] = 0.0
    return list(vectors.to(dtype))


def numbers(vector: Tensor) -> Numbers:
    return [float(x) for x in vector]


def changes(vectors: Sequence[Tensor]) -> list[Numbers]:
    return [[x - 1.0 for x in numbers(vector)] for vector in vectors]


def is_right(got: Tensor, expected: Numbers) -> None:
    """Rounded once, to the nearest float32 or its neighbour."""
    assert got.dtype == torch.float32 and got.shape == (len(expected),)
    for one, true in zip(numbers(got), expected, strict=True):
        assert abs(one - true) <= 2.0**-24 * max(1.0, abs(true)) * 1.0001, (one, true)


def trimmed(change: Numbers, density: float) -> Numbers:
    """TIES, algorithm 1, step 1: the largest stay; of equal ones the first."""
    by_size = sorted(range(len(change)), key=lambda i: (-abs(change[i]), i))
    kept = set(by_size[: int(density * len(change))])
    return [x if i in kept else 0.0 for i, x in enumerate(change)]


def merged(pruned: list[Numbers], weights: Sequence[float], method: str) -> Numbers:
    """TIES, algorithm 1, steps 2 and 3."""
    result = []
    for column in zip(*pruned, strict=True):
        vote = sum(column) if method == "total" else sum((x > 0) - (x < 0) for x in column)
        sign = 1 if vote >= 0 else -1
        agreeing = [w * x for w, x in zip(weights, column, strict=True) if x * sign > 0]
        result.append(1.0 + (sum(agreeing) / len(agreeing) if agreeing else 0.0))
    return result


def summed(rows: list[Numbers], weights: Sequence[float]) -> Numbers:
    return [1.0 + sum(w * x for w, x in zip(weights, column, strict=True)) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", DENSITIES)
def test_ties(density: float, method: str, dtype: torch.dtype) -> None:
    vectors = some(dtype=dtype)
    pruned = [trimmed(change, density) for change in changes(vectors)]
    is_right(ties(vectors, WEIGHTS, density, method), merged(pruned, WEIGHTS, method))


@pytest.mark.parametrize("density", DENSITIES)
def test_magnitude_prune(density: float) -> None:
    vectors = some()
    pruned = [trimmed(change, density) for change in changes(vectors)]
    is_right(magnitude_prune(vectors, WEIGHTS, density), summed(pruned, WEIGHTS))


@pytest.mark.parametrize("density", DENSITIES)
def test_dare(density: float) -> None:
    """Each number stays or not, alone, and what stays is divided by the share: the masks are read off one by one."""
    vectors, keys = some(), ["a", "b", "c"]
    pruned = []
    for change, key in zip(changes(vectors), keys, strict=True):
        mask = numbers(keep_random(torch.ones(WIDTH, dtype=torch.float64), density, key))
        assert {*mask} <= {0.0, 1.0 / density}
        pruned.append([m * x for m, x in zip(mask, change, strict=True)])
    is_right(dare_linear(vectors, WEIGHTS, density, keys), summed(pruned, WEIGHTS))
    for method in ("total", "frequency"):
        is_right(dare_ties(vectors, WEIGHTS, density, method, keys), merged(pruned, WEIGHTS, method))


def test_dare_keeps_the_expectation_and_each_number_by_itself() -> None:
    ones, density, width = torch.ones(40_000, dtype=torch.float64), 0.3, 40_000
    a, b = (keep_random(ones, density, key) > 0 for key in ("a", "b"))
    deviation = math.sqrt(density * (1 - density) / width)
    assert abs(a.double().mean() - density) < 4 * deviation
    both = (a & b).double().mean()
    assert abs(both - density**2) < 4 * math.sqrt(density**2 * (1 - density**2) / width), "two keys are independent"
    neighbours = (a[1:] & a[:-1]).double().mean()
    assert abs(neighbours - density**2) < 6 * math.sqrt(density**2 * (1 - density**2) / width)


def test_what_dare_draws_is_written_down() -> None:
    """On another machine, and with another torch: SHAKE-256 of the key, four bytes a number."""
    kept = keep_random(torch.ones(16, dtype=torch.float64), 0.5, "0:0:out:model.layers.0.self_attn.k_proj")
    drawn = hashlib.shake_256(b"0:0:out:model.layers.0.self_attn.k_proj").digest(64)
    uniform = [int.from_bytes(drawn[4 * i : 4 * i + 4], "big") / 2**32 for i in range(16)]
    assert [bool(x) for x in kept] == [u < 0.5 for u in uniform]


def test_the_first_of_equal_magnitudes_stay() -> None:
    change = torch.tensor([0.5, -0.5, 0.1, 0.5, -0.5, 0.0], dtype=torch.float64)
    assert numbers(keep_largest(change, 0.5)) == [0.5, -0.5, 0.0, 0.5, 0.0, 0.0]
    assert numbers(keep_largest(change, 5 / 6)) == [0.5, -0.5, 0.1, 0.5, -0.5, 0.0]


def test_a_density_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a density of 0\.01 keeps none of 50 numbers: give 0\.02 or more"):
        ties(some(), WEIGHTS, 0.01, "total")


def test_power() -> None:
    vectors = [vector.abs() for vector in some()]
    weights = [0.7, 0.4, 1.3]
    columns = list(zip(*map(numbers, vectors), strict=True))
    expected = [math.prod(x**w for x, w in zip(column, weights, strict=True)) for column in columns]
    is_right(power(vectors, weights), expected)
    is_right(power(vectors, [1, 1, 1]), [math.prod(column) for column in columns])
    is_right(power([-vector for vector in vectors], weights), [-x for x in expected])
    mean = power([torch.tensor([4.0, -4.0, 0.0]), torch.tensor([9.0, -9.0, -3.0])], [0.5, 0.5])
    assert numbers(mean) == [6.0, -6.0, 0.0]


def test_a_power_of_no_weight_leaves_an_adapter_out() -> None:
    assert numbers(power([torch.tensor([-2.0, 0.0]), torch.tensor([3.0, 4.0])], [0.0, 1.0])) == [3.0, 4.0]


@pytest.mark.parametrize(
    ("one", "other", "weights", "message"),
    [
        ([1.0, 2.0, -2.0], [1.0, -1.0, 3.0], [0.5, 0.5], "2 of 3 numbers have different signs, the first number 1:"),
        ([1.0, 0.0], [1.0, 1.0], [-1.0, 2.0], "a 0 has the weight -1, and no power below 0"),
    ],
)
def test_what_has_no_power_is_refused(one: Numbers, other: Numbers, weights: Numbers, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        power([torch.tensor(one), torch.tensor(other)], weights)


def test_max_abs() -> None:
    vectors = some()
    rows = [[w * x for x in change] for w, change in zip(WEIGHTS, changes(vectors), strict=True)]
    is_right(max_abs(vectors, WEIGHTS), [1.0 + max(column, key=abs) for column in zip(*rows, strict=True)])
    assert numbers(max_abs([torch.tensor([1.5]), torch.tensor([0.5])], [1, 1])) == [1.5], "of equal ones the first"


def test_fisher() -> None:
    vectors, weights = some(), [0.7, 0.4, 1.3]
    importances = [vector.abs() for vector in some(4)[1:]]
    for importance in importances:
        importance[:2] = 0.0
    expected = []
    columns = zip(zip(*map(numbers, vectors), strict=True), zip(*map(numbers, importances), strict=True), strict=True)
    for lines, weighed in columns:
        by = [w * f for w, f in zip(weights, weighed, strict=True)]
        by = by if sum(by) else weights
        expected.append(sum(b * x for b, x in zip(by, lines, strict=True)) / sum(by))
    is_right(fisher(vectors, importances, weights), expected)
    is_right(fisher(vectors[:2], [importances[0] + 1, None], [1, 1]), numbers(vectors[0]))


def test_negate_and_analogy() -> None:
    a, b, c = some()
    is_right(negate(a, 0.5), [1.0 - 0.5 * x for x in changes([a])[0]])
    x, y, z = changes([a, b, c])
    is_right(analogy([a, b, c], [1, 1, 1]), [1 + r + (q - p) for p, q, r in zip(x, y, z, strict=True)])
    is_right(analogy([a, b, c], [2, 3, 5]), [1 + 5 * r + 3 * q - 2 * p for p, q, r in zip(x, y, z, strict=True)])


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp(t: float) -> None:
    vectors = some(2)
    p, q = changes(vectors)
    dot = sum(x * y for x, y in zip(p, q, strict=True))
    angle = math.acos(dot / math.hypot(*p) / math.hypot(*q))
    one, other = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    is_right(slerp(vectors, [1 - t, t]), summed([p, q], [one, other]))


def test_slerp_keeps_the_length_where_a_line_does_not() -> None:
    one, other = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0])
    assert numbers(slerp([one, other], [0.5, 0.5])) == pytest.approx([1 + math.sqrt(0.5)] * 2)


def test_slerp_of_parallel_ones_is_the_line_and_of_opposite_ones_refused() -> None:
    vector = some(1)[0]
    for other in (1 + 2 * (vector - 1), torch.ones(WIDTH), vector + 1e-9):
        expected = summed(changes([vector, other]), [0.75, 0.25])
        is_right(slerp([vector, other], [0.75, 0.25]), expected)
    with pytest.raises(ValueError, match="are opposite"):
        slerp([vector, 1 - (vector - 1)], [0.5, 0.5])


PEFTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "ties total": (lambda v, w, d: ties(v, w, d, "total"), lambda t, w, d: merge_utils.ties(t, w, d, "total")),
    "ties frequency": (
        lambda v, w, d: ties(v, w, d, "frequency"),
        lambda t, w, d: merge_utils.ties(t, w, d, "frequency"),
    ),
    "magnitude_prune": (magnitude_prune, merge_utils.magnitude_prune),
}


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("name", PEFTS)
def test_pefts_functions_on_the_same_task_vectors(name: str, density: float) -> None:
    ours, theirs = PEFTS[name]
    generator = torch.Generator().manual_seed(0)
    vectors = list(torch.empty(3, 1000, dtype=torch.float64).uniform_(-1, 3, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a density of 1 prunes nothing
        right = 1 + theirs([vector - 1 for vector in vectors], torch.tensor(WEIGHTS, dtype=torch.float64), density)
    torch.testing.assert_close(ours(vectors, WEIGHTS, density), right.float(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_pefts_dare_with_the_same_draw(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, keys = some(3), ["a", "b", "c"]
    draws = [keep_random(torch.ones(WIDTH, dtype=torch.float64), density, key) > 0 for key in keys]
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    for ours, theirs in (
        (dare_linear(vectors, WEIGHTS, density, keys), merge_utils.dare_linear),
        (dare_ties(vectors, WEIGHTS, density, "total", keys), merge_utils.dare_ties),
    ):
        left = iter(draws)
        monkeypatch.setattr(torch, "bernoulli", lambda shares, left=left: next(left).to(shares.dtype))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            right = 1 + theirs([vector.double() - 1 for vector in vectors], weights, density)
        monkeypatch.undo()
        torch.testing.assert_close(ours, right.float(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("width", [3, 64, 128, 192, 256, 320, 576, 768, 1280, 1536, 4096, 8192, 14336])
def test_the_density_that_an_error_names_is_enough(width):
    with pytest.raises(ValueError, match="give .* or more") as caught:
        keep_largest(torch.ones(width, dtype=torch.float64), 1e-6)
    named = float(str(caught.value).split("give ")[1].split(" ")[0])
    assert int(keep_largest(torch.ones(width, dtype=torch.float64), named).sum()) == 1
    assert named <= 1.1 / width


def test_what_is_taken_where_nothing_is_given():
    """What docs/combining.md found significantly better; of all else what it says, or an error."""
    assert Combination(["a", "b"], None, "ties") == Combination(["a", "b"], None, "ties", density=0.4)
    assert Combination(["a", "b"], None, "delta") == Combination(["a", "b"], [0.85, 0.85], "delta")
    assert Combination(["a", "b"], [1, 1], "delta").used_weights == (1.0, 1.0)
    assert Combination(["a", "b"], None, "power").used_weights == (1.0, 1.0)
    assert Combination(["a", "b"], None, "ties").in_full == "ties of a and b, weights 1 and 1, density 0.4"
    assert Combination(["a", "b"], None, "delta").in_full == "delta of a and b, weights 0.85 and 0.85"
    assert Combination(["a", "b"]).in_full == "product of a and b"
    with pytest.raises(ValueError, match="'delta' of one adapter needs its weight: .* 0.85 each, is for two or more"):
        Combination(["a"], None, "delta")
    for kind in ("dare_linear", "dare_ties", "magnitude_prune"):
        with pytest.raises(ValueError, match="needs a density"):
            Combination(["a", "b"], None, kind)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"adapters": {"a", "b"}}, "adapters must be a list of names"),
        ({"adapters": {"a": 0.5}}, "adapters must be a list of names"),
        ({"weights": 0.5}, "weights must be a sequence of numbers"),
        ({"seed": 1.5, "combination_type": "dare_ties", "density": 0.5}, "seed is 1.5: it is an integer"),
        ({"density": "0.2"}, "density is '0.2': it is a number"),
    ],
)
def test_what_is_of_another_type_is_named(given, words):
    with pytest.raises(TypeError, match=words):
        Combination(**{"adapters": ["a", "b"], "combination_type": "ties", **given})


def test_weights_that_sum_to_infinity_are_not_normalized():
    with pytest.raises(ValueError, match="sum to inf, and cannot be normalized"):
        Combination(["a", "b"], [1e308, 1e308], "delta", normalize=True)
