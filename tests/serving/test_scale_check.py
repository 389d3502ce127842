"""Scales and weights beyond the limit are refused, with the adapter, the site and the value."""

from __future__ import annotations

import pytest
import torch

from ia3rt.adapters.bank import Bank
from ia3rt.adapters.mix import Mix
from ia3rt.adapters.site import Site
from ia3rt.serving import max_scale
from ia3rt.serving.vllm.scale_check import LargeScaleError, checked_vectors

K, DOWN = Site("layers.0.k_proj", "out", 4), Site("layers.1.down_proj", "in", 6)


@pytest.fixture
def bank() -> Bank:
    made = Bank([], torch.device("cpu"), torch.float32, 4)
    made.add("small", {K: torch.tensor([0.5, 1.0, -1.5, 2.0])})
    made.add("large", {DOWN: torch.tensor([1.0, 1.0, 1.0, -30.0, 1.0, 1.0])})
    made.add("huge", {K: torch.full((4,), 3e38), DOWN: torch.full((6,), -3e38)})
    return made


def test_what_is_within_the_limit_is_composed(bank) -> None:
    vectors = checked_vectors(bank, Mix(("small", "large"), (2.0, -0.5), "linear"), 31.0)
    assert torch.equal(vectors[K], 2.0 * torch.tensor([0.5, 1.0, -1.5, 2.0]) - 0.5)
    assert torch.equal(vectors[DOWN], 2.0 - 0.5 * torch.tensor([1.0, 1.0, 1.0, -30.0, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("mix", "told"),
    [
        (Mix(("large",)), ("large", str(DOWN), "-30")),
        (Mix(("small", "large")), ("large", str(DOWN), "-30")),
        (Mix(("small", "large"), (1e38, 0.3), "linear"), ("small", str(K), "1e+38")),
        (Mix(("small", "large"), (1e308, -1e308), "delta"), ("small", str(K), "1e+308")),
        (Mix(("small",), (11.0,), "linear"), ("small", str(K), "11")),
        (Mix(("small",) * 8), ("small", str(K), "25.6289")),
        (Mix(("small", "small"), (6.0, 6.0), "linear"), ("small", str(K), "12")),
        (Mix(("huge", "small")), ("huge", str(K), "1.5e+38")),
        (Mix(("huge", "huge", "small")), ("huge", str(K), "inf")),
        (Mix(("huge", "huge"), (2.0, -2.0), "linear"), ("huge", str(K), "nan")),
    ],
)
def test_what_is_beyond_is_refused(bank, mix, told) -> None:
    with pytest.raises(LargeScaleError) as refused:
        checked_vectors(bank, mix, 10.0)
    assert all(part in str(refused.value) for part in (*told, "at most 10 ")), refused.value


def test_the_limit_is_the_models_or_the_operators(monkeypatch) -> None:
    monkeypatch.delenv(max_scale.VARIABLE, raising=False)
    assert [max_scale.max_scale(dtype) for dtype in ("float16", "bfloat16", "float32")] == [2.0, 1000.0, 1000.0]
    monkeypatch.setenv(max_scale.VARIABLE, "12.5")
    assert max_scale.max_scale("float16") == 12.5
    for bad in ("0.5", "nan", "inf", "much", "-3"):
        monkeypatch.setenv(max_scale.VARIABLE, bad)
        with pytest.raises(ValueError, match=f"--max-scale.*{bad}"):
            max_scale.max_scale("float16")
