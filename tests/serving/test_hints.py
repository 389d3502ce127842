"""What somebody is told who asked for a name that nothing is served under."""

from __future__ import annotations

import time

import pytest

from ia3rt.adapters.mix_text import parse
from ia3rt.serving.vllm.hints import MOST, hint

LOADED = ["sentiment", "author", "base"]


@pytest.mark.parametrize("name", ["sentiment*0.5", "sentiment+author", "sentiment+author*0.3", "sentiment + author"])
def test_a_sum_without_its_prefix(name) -> None:
    told = hint(name, name, LOADED)
    assert f"`mix:{name}`" in told and "delta:" in told
    assert parse(f"mix:{name}") is not None


@pytest.mark.parametrize(
    ("name", "near"),
    [("sentimant", "sentiment"), ("Sentiment", "sentiment"), ("autor", "author"), ("bases", "base")],
)
def test_names_that_are_like_it(name, near) -> None:
    assert hint(name, name, LOADED) == f" Did you mean `{near}`?"
    assert hint(f"author*{name}", name, LOADED) == f" Did you mean `{near}`?"


@pytest.mark.parametrize("name", ["gpt-4", "", "mix:", "mix:zzz", "*", "a**b", "zzz*qqq", "../../x"])
def test_nothing_comes_to_mind(name) -> None:
    assert hint(name, name, LOADED) == ""


def test_a_few_and_short() -> None:
    many = [f"{number:04d}-{'sentiment' * 9}" for number in range(5_000)]
    told = hint(f"0000-{'sentiment' * 9000}", f"0000-{'sentiment' * 9000}", many)
    assert told.count("`") <= 2 * MOST and len(told) < 200
    long = "+".join(["a" * 300] * 9)
    assert hint(long, long, LOADED) == " A weighted sum begins with mix: or delta:, as in `mix:a*0.7+b*0.3`."


def test_it_takes_no_time() -> None:
    """Whoever sends wrong names keeps everybody else waiting meanwhile."""
    many = [f"customer-{number:05d}-sentiment" for number in range(100_000)]
    start = time.perf_counter()
    for number in range(10):
        hint(f"customer-{number:05d}-sentimant", f"customer-{number:05d}-sentimant", many)
    assert (time.perf_counter() - start) / 10 < 0.1  # 0.01 s on a core that has nothing else to do
