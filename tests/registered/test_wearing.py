"""What is registered is worn as in PEFT, to the bit, and as what its vectors are."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from registering import IDS, NAMES, check, patched
from tiny import logits, tiny_model

import ia3rt


def test_what_is_registered_is_worn_as_in_peft(folder, truth):
    runtime = patched(folder)
    assert runtime.adapters == [] and runtime.registered_adapters == list(NAMES)
    for _ in range(2):
        for name in NAMES:
            runtime.set_adapter(name)
            assert torch.equal(logits(runtime.model, IDS), truth[name])
            assert runtime.active_adapters == [name] and len(runtime.adapters) <= 2
    for first, second in pairwise(NAMES):
        runtime.set_adapter(None)
        check(runtime, truth, [first, None, second, first])


def test_weighted_sums_of_registered_adapters_are_those_of_their_vectors(folder, truth):
    runtime = patched(folder, rows=5)
    for first, second in pairwise(NAMES):
        runtime.set_adapter({first: 0.5, second: 0.25})
        worn = logits(runtime.model, IDS)
        other = ia3rt.patch(tiny_model())
        stored = {name: runtime.get_adapter(name).vectors for name in (first, second)}
        other.add_adapter(
            "sum", {s.key: 0.5 * stored[first][s.key] + 0.25 * stored[second][s.key] for s in other.sites}
        )
        other.set_adapter("sum")
        torch.testing.assert_close(worn, logits(other.model, IDS))
    runtime.set_adapter(None)
    check(runtime, truth, ["a", "b", "c", None])


def test_what_was_prefetched_is_there(folder, truth):
    runtime = patched(folder)
    runtime.prefetch(["a", "b"]).result()
    assert runtime.adapters == ["a", "b"] and runtime.stats().misses == 2 == runtime.stats().disk_loads
    check(runtime, truth, ["b", "a", None, "a"])
    assert runtime.stats().hits == 2 and runtime.stats().disk_loads == 2
    with pytest.raises(ValueError, match="unknown adapter 'x'"):
        runtime.prefetch(["a", "x"])
    with runtime.route(["a", "b", None, None]):
        runtime.prefetch("c").result()
        assert set(runtime.adapters) == {"a", "b"}, "there is no room for it, so it stays in the host's memory"
    runtime.set_adapter("c")
    assert runtime.stats().host_loads == 1


def test_a_copy_of_the_model_has_registered_adapters_of_its_own(folder, truth):
    runtime = patched(folder)
    runtime.set_adapter("a")
    copied = copy.deepcopy(runtime.model)
    other = ia3rt.patch(copied)
    other.set_adapter("b")
    assert torch.equal(logits(copied, IDS), truth["b"]) and torch.equal(logits(runtime.model, IDS), truth["a"])
    assert other.adapters == ["a", "b"] and runtime.adapters == ["a"]
