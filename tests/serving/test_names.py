"""The names of mixes: what they mean, and that nothing else means one."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ia3rt.adapters.mix import Mix
from ia3rt.adapters.mix_text import MOST, MixNameError, canonical, parse, spelled
from ia3rt.serving.vllm.merged_adapters import read_merged_adapters
from ia3rt.serving.vllm.names import check_loaded_name

NAMES = st.text("abcXYZ019._-/", min_size=1, max_size=12)
WEIGHTS = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize(
    ("name", "mix"),
    [
        ("a*b", Mix(("a", "b"))),
        ("org/sql-v1.2*formal", Mix(("org/sql-v1.2", "formal"))),
        ("mix:a*0.7+b*0.3", Mix(("a", "b"), (0.7, 0.3), "linear")),
        ("mix:a+b*-2", Mix(("a", "b"), (1.0, -2.0), "linear")),
        ("mix:a*1e+2+b*1.5E+1", Mix(("a", "b"), (100.0, 15.0), "linear")),
        ("mix:1e+b", Mix(("1e", "b"), (1.0, 1.0), "linear")),
        ("delta:a*0.5", Mix(("a",), (0.5,), "delta")),
        ("a", None),
        ("a+b", None),
        ("org:a", None),
        ("", None),
    ],
)
def test_what_a_name_means(name, mix) -> None:
    assert parse(name) == mix


@pytest.mark.parametrize(
    "name",
    [
        "*",
        "a*",
        "a**b",
        "a*b c*d",
        "mix:",
        "mix:a*",
        "mix:a*b",
        "mix:+a",
        "mix:a*nan",
        "mix:a*0.5*2",
        "mix:a*1_0",
        "mix:a*٣",
        "mix:a*0x1",
        "delta:a b",
    ],
)
def test_a_name_that_goes_on_as_no_mix(name) -> None:
    with pytest.raises(MixNameError) as refused:
        parse(name)
    assert name in str(refused.value) and "\n" not in str(refused.value)


def test_a_name_of_any_length_is_cheap() -> None:
    with pytest.raises(MixNameError, match=str(MOST)):
        parse("*".join("a" * (MOST + 1)))
    with pytest.raises(MixNameError) as refused:
        parse("mix:" + "a*b" * 100_000)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "name", ["mix:a*" + "1" * 10**6 + "x", "mix:a*" + "z" * 10**7, "*" * 10**7, "delta:" + "+" * 10**7]
)
def test_a_long_name_is_refused_before_it_is_read(name) -> None:
    begun = time.perf_counter()
    with pytest.raises(MixNameError) as refused:
        parse(name)
    assert time.perf_counter() - begun < 1 and len(str(refused.value)) < 200


def test_a_weight_of_many_digits_is_read_in_no_time() -> None:
    begun = time.perf_counter()
    for weight in ("1" * 200 + "x", "1" * 30_000, "1" * 30_000 + "x"):
        with pytest.raises(MixNameError, match="finite number"):
            parse(f"mix:a*{weight}")
    assert parse("mix:a*" + "0" * 200 + "1") == Mix(("a",), (1.0,), "linear")
    assert time.perf_counter() - begun < 1


@pytest.mark.parametrize("name", ["mix:a*\ud800", "a*\udfff", "mix:\ud83d*1"])
def test_half_a_character_is_no_name(name) -> None:
    with pytest.raises(MixNameError, match="half a character"):
        parse(name)


@pytest.mark.parametrize("name", ["a" * 257, "a" * 10**7, "a*b", "mix:a", "a\x1b"])
def test_a_name_that_no_adapter_is_loaded_under(name) -> None:
    with pytest.raises(MixNameError, match="under another one"):
        check_loaded_name(name)


@given(st.lists(NAMES, min_size=2, max_size=5))
def test_products_are_read_back(names) -> None:
    mix = Mix(tuple(names))
    assert parse(spelled(mix)) == mix
    assert canonical(mix) == canonical(Mix(tuple(reversed(names))))


@given(st.lists(st.tuples(NAMES, WEIGHTS), min_size=1, max_size=5), st.sampled_from(["linear", "delta"]))
def test_sums_are_read_back_to_the_bit(terms, kind) -> None:
    mix = Mix(tuple(name for name, _ in terms), tuple(weight for _, weight in terms), kind)
    assert parse(spelled(mix)) == mix


@given(st.dictionaries(NAMES, WEIGHTS, min_size=1, max_size=5))
def test_the_order_of_a_sum_does_not_matter(terms) -> None:
    forwards = Mix(tuple(terms), tuple(terms.values()), "linear")
    backwards = Mix(tuple(reversed(terms)), tuple(reversed(terms.values())), "linear")
    assert canonical(forwards) == canonical(backwards)


def test_an_adapter_that_comes_twice_in_a_sum_comes_once() -> None:
    assert canonical(Mix(("b", "a", "b"), (0.5, 1.0, 0.25), "linear")) == Mix(("a", "b"), (1.0, 0.75), "linear")


@pytest.mark.parametrize(
    ("body", "mix"),
    [
        ({"ids": ["a", "b"], "weights": [0.7, 0.3]}, Mix(("a", "b"), (0.7, 0.3), "linear")),
        ({"ids": ["a", "b"]}, Mix(("a", "b"), (1.0, 1.0), "linear")),
        ({"ids": ["a", "b"], "merge_strategy": "product"}, Mix(("a", "b"))),
        ({"ids": ["a"], "weights": [2], "merge_strategy": "delta"}, Mix(("a",), (2.0,), "delta")),
    ],
)
def test_what_a_body_means(body, mix) -> None:
    assert read_merged_adapters(body) == mix


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        {"ids": "ab"},
        {"ids": ["a", 1]},
        {"ids": ["a"], "weights": "1"},
        {"ids": ["a"], "weights": [True]},
        {"ids": ["a"], "weights": [10**400]},
        {"ids": ["a", "b"], "weights": [2.0, 1.0], "merge_strategy": "product"},
        {"ids": ["a"], "merge_strategy": "dare_ties"},
        {"ids": ["a"], "merge_strategy": ["linear"]},
        {"ids": ["a"], "density": 0.5},
    ],
)
def test_a_body_that_means_no_mix(body) -> None:
    with pytest.raises(MixNameError, match="merged_adapters"):
        read_merged_adapters(body)
