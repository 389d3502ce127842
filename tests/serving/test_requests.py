"""The requests that stand for adapters and mixes: what is the same is one, and what is not shares nothing."""

import itertools

import pytest

from ia3rt.adapters.mix import Mix
from ia3rt.serving.vllm import requests
from ia3rt.serving.vllm.requests import Requests, public_name
from ia3rt.serving.vllm.source import Source

A, B, OTHER = "/store/aaa", "/store/bbb", "/store/ccc"


@pytest.fixture
def known() -> Requests:
    return Requests(itertools.count(1).__next__)


def test_equal_mixes_share_a_slot(known) -> None:
    first = known.mix(Source(Mix(("a", "b"), (0.7, 0.3), "linear"), {"a": A, "b": B}))
    again = known.mix(Source(Mix(("b", "a"), (0.3, 0.7), "linear"), {"b": B, "a": A}))
    assert first is again
    assert public_name(first.lora_name) == "mix:a*0.7+b*0.3"
    source = Source.of(first.lora_path, first.lora_name)
    assert source.mix == Mix(("a", "b"), (0.7, 0.3), "linear") and source.folders == {"a": A, "b": B}


def test_different_mixes_share_nothing(known) -> None:
    made = [
        known.mix(Source(Mix(("a", "b")), {"a": A, "b": B})),
        known.mix(Source(Mix(("a", "b"), (0.5, 0.5), "linear"), {"a": A, "b": B})),
        known.mix(Source(Mix(("a", "b"), (0.5, 0.5), "delta"), {"a": A, "b": B})),
        known.mix(Source(Mix(("a", "b")), {"a": A, "b": OTHER})),
        known.adapter("a", A),
        known.adapter("b", A),
        known.adapter("a", OTHER),
    ]
    for part in ("lora_name", "lora_int_id"):
        assert len({getattr(request, part) for request in made}) == len(made)
    assert all(0 < request.lora_int_id < 2**31 for request in made)


def test_a_name_that_means_the_same_again_is_the_same_request(known) -> None:
    first = known.adapter("a", A)
    second = known.adapter("a", OTHER)
    assert known.adapter("a", A) is first and known.adapter("a", OTHER) is second
    assert first.lora_name == "a" and public_name(second.lora_name) == "a" != second.lora_name


def test_what_was_forgotten_gets_another_name(known, monkeypatch) -> None:
    monkeypatch.setattr(requests, "MOST", 2)
    first = known.mix(Source(Mix(("a", "b")), {"a": A, "b": B}))
    for weight in range(3):
        known.mix(Source(Mix(("a",), (float(weight),), "delta"), {"a": A}))
    again = known.mix(Source(Mix(("a", "b")), {"a": A, "b": B}))
    assert again.lora_name != first.lora_name and again.lora_int_id != first.lora_int_id
    assert again.lora_path == first.lora_path


def test_servers_side_by_side_number_apart() -> None:
    servers = [Requests(itertools.count(1).__next__, rank, 3) for rank in range(3)]
    numbers = [
        server.mix(Source(Mix(("a",), (float(weight),), "delta"), {"a": A})).lora_int_id
        for server in servers
        for weight in range(5)
    ]
    assert len(set(numbers)) == 15
