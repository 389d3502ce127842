"""What explain() says, against what a forward then launches."""

import pytest
import torch
from tiny import FAMILIES, logits, tiny_model, token_ids
from torch import nn
from where import DEVICE

import ia3rt
from ia3rt import ops
from ia3rt.kernels import launch

NAMES = ("linear", "linear_pair", "activation", "gate_up", "rope")


@pytest.fixture
def launched(monkeypatch):
    """The ops that were called; on a GPU a call that is like one before would launch the same again, past the op."""
    monkeypatch.setattr(launch, "can_repeat", lambda: False)
    calls = []
    for name in NAMES:
        op = getattr(ops, name)

        def record(*args, op=op, name=name):
            calls.append(name)
            return op(*args)

        record.body = op.body
        monkeypatch.setattr(ops, name, record)
    return calls


@pytest.mark.parametrize("fuse_gate_up", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_names_what_a_forward_launches(family, fuse_gate_up, launched):
    runtime = ia3rt.patch(tiny_model(family).to(DEVICE), backend="triton", fuse_gate_up=fuse_gate_up)
    logits(runtime.model, token_ids(2, 4))
    explanation = ia3rt.explain(runtime.model, rows=8)
    assert [entry.site for entry in explanation.sites] == runtime.sites
    assert {entry.backend for entry in explanation.sites} == {"triton"}
    assert {entry.kernel for entry in explanation.sites} == set(launched)


def test_each_backend_and_kind_of_weight_has_its_reason(monkeypatch):
    assert {(entry.kernel, entry.config) for entry in ia3rt.explain(ia3rt.patch(tiny_model()).model).sites} == {
        ("multiplication", "")
    }

    model = tiny_model().to(DEVICE)
    path = "model.layers.0.self_attn.o_proj"
    runtime = ia3rt.patch(model, backend="triton", target_modules=["k_proj", "o_proj"])

    def why(rows: int) -> str:
        return next(entry.why for entry in ia3rt.explain(model, rows).sites if entry.site.path == path)

    assert "few rows" in why(4)
    assert "torch multiplies faster" in why(4096)  # in float32
    runtime.set_adapter(None)
    assert "multiplication" not in {entry.kernel for entry in ia3rt.explain(model).sites}

    class Quantised(nn.Linear):
        def forward(self, input):
            return super().forward(input)

    other = tiny_model().to(DEVICE)
    other.model.layers[0].self_attn.o_proj.__class__ = Quantised
    ia3rt.patch(other, backend="triton", target_modules=["o_proj"])
    entry = next(entry for entry in ia3rt.explain(other).sites if entry.site.path == path)
    assert entry.kernel == "multiplication" and "no kernel reads" in entry.why


def test_an_input_site_says_where_x_is_scaled():
    model = tiny_model(dtype=torch.bfloat16).to(DEVICE)
    runtime = ia3rt.patch(model, backend="triton", target_modules=["o_proj"], feedforward_modules=["o_proj"])
    assert runtime.sites[0].side == "in"
    for rows in (1, 512):
        entry = ia3rt.explain(model, rows).sites[0]
        assert entry.config == "torch" and "pass before" in entry.why


def test_printed_it_shows_each_kind_of_site_once():
    text = str(ia3rt.explain(ia3rt.patch(tiny_model().to(DEVICE), backend="triton").model))
    assert "6 sites, triton backend, 1 rows" in text
    assert text.count("× 2") == 3
    for part in ("model.layers.N.self_attn.k_proj (out)", "rope", "activation", "warps"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_plain_model_is_an_error():
    with pytest.raises(ValueError, match="patch"):
        ia3rt.explain(tiny_model())


def test_a_fused_projection_is_explained_by_the_rotary_embedding_too(launched):
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = Phi3ForCausalLM(config).eval().to(DEVICE)
    ia3rt.patch(model, backend="triton")
    logits(model, token_ids(1, 3))
    entries = ia3rt.explain(model, 3).sites
    assert {entry.kernel for entry in entries} == set(launched) == {"rope", "activation"}
    assert "heads" in next(entry.config for entry in entries if entry.kernel == "rope")
