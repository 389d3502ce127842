"""Interleaved timing, with a clock that the test moves."""

import pytest

from ia3rt.bench.interleaved import Timing, time_interleaved


def test_ways_take_turns_and_the_warm_up_is_not_counted():
    now, order = 0.0, []

    def way(name, costs):
        def run(turn):
            nonlocal now
            order.append((turn, name))
            now += costs[turn + 1]

        return run

    ways = {"a": way("a", [100, 1, 2, 3]), "b": way("b", [100, 10, 30, 20])}
    timings = time_interleaved(ways, 3, clock=lambda: now)
    assert sorted(order) == [(turn, name) for turn in (-1, 0, 1, 2) for name in "ab"]
    assert [turn for turn, _ in order] == sorted(turn for turn, _ in order)
    assert timings["a"].p50 == 2 and timings["b"].p50 == 20
    assert timings["b"].p20 == pytest.approx(14) and timings["b"].p80 == pytest.approx(26)


def test_what_comes_after_what_changes_from_round_to_round():
    order = []
    ways = {name: lambda turn, name=name: order.append(name) for name in "abc"}
    time_interleaved(ways, 40)
    rounds = {tuple(order[start : start + 3]) for start in range(0, len(order), 3)}
    assert len(rounds) == 6


def test_waiting_for_the_device_counts():
    now, pending = 0.0, 0.0

    def launch(_):
        nonlocal pending
        pending += 5

    def wait():
        nonlocal now, pending
        now, pending = now + pending, 0.0

    assert time_interleaved({"a": launch}, 1, wait=wait, clock=lambda: now)["a"] == Timing(5, 5, 5)
