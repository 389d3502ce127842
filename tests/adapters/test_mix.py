"""What users can say a row wears, and what is refused."""

import math

import pytest

from ia3rt import Mix
from ia3rt.adapters.mix_text import read_mix


@pytest.mark.parametrize(
    ("spec", "expected", "text"),
    [
        ("a", Mix(("a",)), "a"),
        (None, Mix(()), "base"),
        (["a", "b"], Mix(("a", "b"), None, "product"), "a * b"),
        (("a", "b"), Mix(("a", "b")), "a * b"),
        ({"a": 0.7, "b": 0.3}, Mix(("a", "b"), (0.7, 0.3), "linear"), "0.7 a + 0.3 b"),
        ({"adapters": ["a", "b"]}, Mix(("a", "b")), "a * b"),
        (
            {"adapters": ["a", "b"], "weights": [0.7, 0.3], "combination_type": "linear"},
            Mix(("a", "b"), (0.7, 0.3), "linear"),
            "0.7 a + 0.3 b",
        ),
        (
            {"adapters": ("a",), "weights": (2,), "combination_type": "delta"},
            Mix(("a",), (2.0,), "delta"),
            "1 + 2 (a - 1)",
        ),
        (
            {"adapters": 0.5, "weights": 2.0},
            Mix(("adapters", "weights"), (0.5, 2.0), "linear"),
            "0.5 adapters + 2 weights",
        ),
        (Mix(["a"], [0.5], "delta"), Mix(("a",), (0.5,), "delta"), "1 + 0.5 (a - 1)"),
        (Mix(("a", "b"), (1, 1.0)), Mix(("a", "b")), "a * b"),
    ],
)
def test_shorthands(spec, expected, text):
    mix = Mix.of(spec)
    assert mix == expected
    assert hash(mix) == hash(expected)
    assert str(mix) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("a", "b"), (0.5, 1.0)), "a product takes no weights.*order of factors does not matter"),
        ((("a", "b"), None, "linear"), r"a linear mix needs weights, one for each of \['a', 'b'\]"),
        ((("a", "b"), (1.0,), "linear"), "1 weights for 2 adapters"),
        ((("a",), (1.0, 2.0), "delta"), "2 weights for 1 adapters"),
        ((("a",), (1.0, 1.0)), "2 weights for 1 adapters"),
        ((("a",), (math.nan,), "linear"), "the weight of adapter 'a' is nan: weights must be finite"),
        ((("a",), (math.inf,), "delta"), "the weight of adapter 'a' is inf"),
        (((), (), "linear"), "a linear mix needs at least one adapter"),
        (("ab",), "adapters must be a sequence of names, got the string 'ab'"),
        ((("a",), None, "cat"), "unknown combination_type 'cat': use one of 'product', 'linear', 'delta'"),
    ],
)
def test_what_is_no_mix_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mix(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "adapters must be a sequence of names, got None"),
        ((("a",), 0.5, "linear"), r"weights must be a sequence of numbers, one for each of \['a'\], got 0.5"),
        ((("a", "b"), {0.5, 0.7}, "linear"), "weights must be a sequence of numbers"),
    ],
)
def test_what_is_no_sequence_is_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        Mix(*arguments)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ([], ValueError, "an empty list of adapters: use None"),
        ({}, ValueError, "at least one adapter"),
        ({"a": "x"}, ValueError, "the weight of adapter 'a' is 'x': weights are numbers"),
        ({"a": None}, ValueError, "'a' is None: weights are numbers"),
        ({"a": [1]}, ValueError, r"'a' is \[1\]: weights"),
        ({"a": True}, ValueError, "'a' is True: weights"),
        ({"a": 10**400}, ValueError, "'a' is 10+.*: weights are numbers"),
        ({"weights": [1]}, ValueError, "adapters must be a list of adapters' names, not None"),
        ({"adapters": "ab"}, ValueError, "adapters must be a list of adapters' names, not ab"),
        ({"adapters": []}, ValueError, "adapters must be a list"),
        ({"adapters": ["a", ""]}, ValueError, "adapters must be a list"),
        ({"adapters": ["a"], "density": 0.5}, ValueError, "a mix has no field 'density'"),
        ({"adapters": ["a"], "combination_type": "ties"}, ValueError, "combination_type 'ties' is not known"),
        ({"adapters": ["a"], "weights": [True], "combination_type": "linear"}, ValueError, "must be a list of"),
        ({"adapters": ["a"], "weights": [10**400], "combination_type": "linear"}, ValueError, "list of finite numbers"),
        (
            {"adapters": ["a", "b"], "weights": [1], "combination_type": "linear"},
            ValueError,
            "1 weights for 2 adapters",
        ),
        ({"adapters": ["a"], "combination_type": "linear"}, ValueError, "a linear mix needs weights"),
        (3, TypeError, "3 is no mix"),
        (["a", 1], TypeError, "is no mix"),
    ],
)
def test_what_is_no_shorthand_is_refused(spec, error, message):
    with pytest.raises(error, match=message):
        Mix.of(spec)


def test_text_means_a_mix_unless_an_adapter_has_that_name():
    assert read_mix("delta:a*0.5", {"a"}.__contains__) == Mix(("a",), (0.5,), "delta")
    assert read_mix("a*b", {"a", "b"}.__contains__) == Mix(("a", "b"))
    assert read_mix("a*b", {"a*b"}.__contains__) == Mix(("a*b",))
    assert read_mix(["a*b"], {"a", "b"}.__contains__) == Mix(("a*b",))
    with pytest.raises(ValueError, match="'a\\*' is no mix"):
        read_mix("a*", {"a"}.__contains__)
