"""What a request's path says, and the vectors that it stands for, against PEFT's."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import TARGETS, peft_model, tiny_model

from ia3rt.adapters.mix import Mix
from ia3rt.serving.vllm.source import Source


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    wrapped = peft_model(tiny_model(), "llama", "bcd")
    folder = tmp_path_factory.mktemp("adapters")
    wrapped.save_pretrained(folder)
    return wrapped, folder


def vectors_of(wrapped, name: str) -> dict[str, torch.Tensor]:
    suffix = f".ia3_l.{name}"
    prefix = "base_model.model."
    return {
        key.removesuffix(suffix).removeprefix(prefix): value.detach().flatten()
        for key, value in wrapped.named_parameters()
        if key.endswith(suffix)
    }


def sent(source: Source, name: str) -> Source:
    """The source that a worker finds in the path."""
    received = Source.of(source.path(), name)
    assert received is not None
    return received


def test_one_adapter(adapters) -> None:
    wrapped, folder = adapters
    source = Source.of(str(folder / "b"), "b")
    got = {site.path: vector for site, vector in source.vectors().items()}
    expected = vectors_of(wrapped, "b")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[path], vector) for path, vector in expected.items())
    assert source.path() == str(folder / "b")


def test_a_product(adapters) -> None:
    wrapped, folder = adapters
    source = sent(Source(Mix(("b", "c", "d")), {name: str(folder / name) for name in "bcd"}), "b*c*d")
    b, c, d = (vectors_of(wrapped, name) for name in "bcd")
    for site, vector in source.vectors().items():
        torch.testing.assert_close(vector.double(), b[site.path].double() * c[site.path] * d[site.path])


def test_a_weighted_sum(adapters) -> None:
    wrapped, folder = copy.deepcopy(adapters[0]), adapters[1]
    wrapped.add_weighted_adapter(["b", "c"], [0.7, -0.2], "sum")
    source = sent(Source(Mix(("b", "c"), (0.7, -0.2), "linear"), {name: str(folder / name) for name in "bc"}), "sum")
    expected = vectors_of(wrapped, "sum")
    for site, vector in source.vectors().items():
        torch.testing.assert_close(vector, expected[site.path])


def test_sites_are_those_where_any_acts(adapters, tmp_path) -> None:
    narrow = peft_model(tiny_model(), "llama", "e", target_modules=["down_proj"], feedforward_modules=["down_proj"])
    narrow.save_pretrained(tmp_path)
    folders = {"e": str(tmp_path / "e"), "b": str(adapters[1] / "b")}
    alone = Source(Mix(("e",)), {"e": folders["e"]}).vectors()
    assert {site.path.rpartition(".")[2] for site in alone} == {"down_proj"}
    both = Source(Mix(("b", "e"), (0.5, 0.5), "linear"), folders).vectors()
    assert {site.path.rpartition(".")[2] for site in both} == set(TARGETS["llama"]["target_modules"])
    b = vectors_of(adapters[0], "b")
    for site, vector in both.items():
        if site.path.endswith("k_proj"):
            torch.testing.assert_close(vector, 0.5 * b[site.path] + 0.5)


def test_a_lora_is_no_source(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert Source.of(str(tmp_path), "a") is None
    assert Source.of(str(tmp_path / "missing"), "a") is None
