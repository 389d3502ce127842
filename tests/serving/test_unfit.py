"""Which layers of a model do not run on the step's tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from ia3rt.serving.vllm.unfit import refuse_unfit

SELF, QUERY, KEYS = "decoder.self.qkv_proj", "decoder.cross.q_proj", "decoder.cross.kv_proj"
ENCODER, GATE, SHARED, NEAR = "encoder.fc1", "decoder.mlp.gate", "decoder.mlp.shared.up", "decoder.mlps.up"
NAMES = (SELF, QUERY, KEYS, ENCODER, GATE, SHARED, NEAR)
PACKED = {
    SELF: ["decoder.self.q_proj", "decoder.self.k_proj", "decoder.self.v_proj"],
    KEYS: ["decoder.cross.k_proj", "decoder.cross.v_proj"],
}


class Cross(nn.Module):
    """vLLM's attention to what an encoder saw."""


class Latent(nn.Module):
    """vLLM's latent attention."""


class Attention(nn.Module):
    kv_sharing_target_layer_name: str | None = None


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr("ia3rt.serving.vllm.unfit.CrossAttention", Cross)
    model = nn.Module()
    for name in NAMES:
        module = model
        for part in name.split("."):
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
    for name in NAMES:
        model.get_submodule(name).base_layer = nn.Module()
    model.decoder.cross.attn = Cross()
    model.decoder.self.attn = Attention()
    return model


def refused(model: nn.Module, *, fast: bool = False, ubatching: bool = False, context: int = 1) -> dict[str, str]:
    """By layer, why it can wear no vector."""
    config = SimpleNamespace(
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=fast),
        parallel_config=SimpleNamespace(use_ubatching=ubatching, prefill_context_parallel_size=context),
    )
    wearing = {name: model.get_submodule(name) for name in NAMES}
    refuse_unfit(model, wearing, PACKED, config)
    return {name: layer.ia3_refusal for name, layer in wearing.items() if layer.ia3_refusal is not None}


def test_what_looks_up_in_an_encoder(model) -> None:
    assert refused(model).keys() == {KEYS}


def test_an_encoder_among_the_texts_layers(model) -> None:
    model._tower_model_names = ["encoder"]
    told = refused(model)
    assert told.keys() == {KEYS, ENCODER} and "encoder" in told[ENCODER]


def test_experts_that_get_a_part_of_the_tokens(model) -> None:
    model.decoder.mlp.is_sequence_parallel = model.decoder.mlps.is_sequence_parallel = False
    assert refused(model).keys() == {KEYS}
    model.decoder.mlp.is_sequence_parallel = True
    told = refused(model)
    assert told.keys() == {KEYS, GATE, SHARED} and "--enable-expert-parallel" in told[GATE]


def test_what_latent_attention_takes_apart(model, monkeypatch) -> None:
    monkeypatch.setattr("ia3rt.serving.vllm.unfit.MLAAttention", Latent)
    near = model.get_submodule(NEAR)
    model.decoder.latent = Latent()
    for kept in (near, near.base_layer):  # vLLM replaces it there too, or not
        model.decoder.latent.kv_b_proj = kept
        told = refused(model)
        assert told.keys() == {KEYS, NEAR} and "latent attention" in told[NEAR]


def test_options_that_split_steps(model) -> None:
    assert refused(model, fast=True).keys() == {KEYS}  # which does nothing where no layer shares keys
    model.decoder.self.attn.kv_sharing_target_layer_name = "layers.0"
    for options, told in (
        ({"fast": True}, "--kv-sharing-fast-prefill"),
        ({"ubatching": True}, "--enable-dbo"),
        ({"context": 2}, "--prefill-context-parallel-size"),
    ):
        why = refused(model, **options)
        assert why.keys() == set(NAMES) and told in why[QUERY]
