"""The attention implementation "ia3rt" of transformers, compared with eager attention in the same tiny models."""

import copy
import functools

import pytest
import torch
from tiny import VOCABULARY, logits, token_ids
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
)
from where import CPU, DEVICE

import ia3rt
from ia3rt import ops
from ia3rt.kernels import launch
from ia3rt.modules.attention import _unread, attention_forward, register

register()
SIZES = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=2),
    "mistral": lambda: MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5),
    "gemma2": lambda: Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=16, sliding_window=5, attn_logit_softcapping=2.0
    ),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=4),
}
IDS = token_ids().to(DEVICE)
CLOSE = dict(rtol=1e-4, atol=1e-5)


def pair(name, device=DEVICE):
    """The same model with eager attention, and with ours."""
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    eager.generation_config.pad_token_id = 0
    eager.generation_config.eos_token_id = None
    ours = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="ia3rt").eval()
    ours.load_state_dict(eager.state_dict())
    ours.generation_config = eager.generation_config
    return eager.to(device), ours.to(device)


@pytest.fixture
def calls(monkeypatch):
    """How often the op ran."""
    seen = []
    attend = ops.attention.body

    @functools.wraps(attend)
    def run(*arguments):
        seen.append(1)
        return attend(*arguments)

    monkeypatch.setattr(ops.attention, "body", run)
    # On a GPU a call that is like one before would launch the same again, past the op.
    monkeypatch.setattr(launch, "can_repeat", lambda: False)
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_greedy_tokens(name, calls):
    eager, ours = pair(name)
    torch.testing.assert_close(logits(ours, IDS), logits(eager, IDS), **CLOSE)
    assert len(calls) == 2
    kwargs = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(ours.generate(IDS, **kwargs), eager.generate(IDS, **kwargs))
    assert len(calls) == 2 + 2 * 4


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(name, side):
    eager, ours = pair(name)
    mask = torch.ones_like(IDS)
    mask[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    with torch.no_grad():
        results = [model(IDS, attention_mask=mask).logits[mask.bool()] for model in (ours, eager)]
    torch.testing.assert_close(*results, **CLOSE)
    if side == "left":
        kwargs = dict(attention_mask=mask, max_new_tokens=3, do_sample=False)
        assert torch.equal(ours.generate(IDS, **kwargs), eager.generate(IDS, **kwargs))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_static_cache(name):
    eager, ours = pair(name)
    kwargs = dict(max_new_tokens=3, do_sample=False, cache_implementation="static", disable_compile=True)
    assert torch.equal(ours.generate(IDS, **kwargs), eager.generate(IDS, **kwargs))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_training(name):
    gradients = []
    for model in pair(name):
        model.train()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-5)


def test_an_encoder():
    torch.manual_seed(0)
    config = BertConfig(**SIZES, attn_implementation="eager")
    eager = BertModel(config).eval().to(DEVICE)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("ia3rt")
    mask = torch.ones_like(IDS)
    mask[0, 5:] = 0
    with torch.no_grad():
        for kwargs in ({}, dict(attention_mask=mask)):
            ours_out, eager_out = (model(IDS, **kwargs).last_hidden_state for model in (ours, eager))
            kept = mask.bool() if kwargs else slice(None)
            torch.testing.assert_close(ours_out[kept], eager_out[kept], **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_in_one_graph(name):
    eager, ours = pair(name)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, IDS), logits(eager, IDS), **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
def test_without_triton_torch_computes(name, torch_backend):
    eager, ours = pair(name, CPU)
    torch.testing.assert_close(logits(ours, IDS), logits(eager, IDS), **CLOSE)


def test_a_patched_model():
    eager, ours = pair("llama")
    results = []
    for model in (eager, ours):
        runtime = ia3rt.patch(model)
        generator = torch.Generator().manual_seed(1)
        vectors = {s.key: torch.empty(s.width).uniform_(0, 2, generator=generator) for s in runtime.sites}
        runtime.add_adapter("b", vectors)
        with runtime.route(["b", None, "b"]):
            results.append(logits(model, IDS))
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("extra", [dict(dropout=0.1), dict(s_aux=torch.ones(4)), dict(position_bias=torch.ones(1))])
def test_what_is_not_supported_is_said(extra):
    q = torch.ones(1, 4, 3, 16)
    with pytest.raises(ValueError, match=next(iter(extra))):
        attention_forward(torch.nn.Module(), q, q, q, None, **extra)


@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode])
def test_what_a_mode_saw_first_can_be_trained_outside_of_it(mode) -> None:
    _unread.cache_clear()
    module, x = torch.nn.Module(), torch.randn(1, 2, 4, 16, device=DEVICE)
    with mode() as entered:
        given = entered.from_tensor(x) if mode is FakeTensorMode else x
        assert attention_forward(module, given, given, given, None)[0].shape == (1, 4, 2, 16)
    query = x.clone().requires_grad_()
    attention_forward(module, query, x, x, None)[0].sum().backward()
    assert query.grad.isfinite().all()
