"""What users can say a row wears, and what is refused."""

import math

import pytest

from ia3rt import Mix


@pytest.mark.parametrize(
    ("spec", "expected", "text"),
    [
        ("a", Mix(("a",)), "a"),
        (None, Mix(()), "base"),
        (["a", "b"], Mix(("a", "b"), None, "product"), "a * b"),
        (("a", "b"), Mix(("a", "b")), "a * b"),
        ({"a": 0.7, "b": 0.3}, Mix(("a", "b"), (0.7, 0.3), "linear"), "0.7 a + 0.3 b"),
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
    ("spec", "error", "message"),
    [
        ([], ValueError, "an empty list of adapters: use None"),
        ({}, ValueError, "at least one adapter"),
        (3, TypeError, "3 is no mix"),
        (["a", 1], TypeError, "is no mix"),
    ],
)
def test_what_is_no_shorthand_is_refused(spec, error, message):
    with pytest.raises(error, match=message):
        Mix.of(spec)
