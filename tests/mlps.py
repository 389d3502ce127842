"""Small models, one for each form of MLP, and their comparison with adapters multiplied into weights, in float64."""

import torch
from tiny import logits, scaled, token_ids
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)
from where import home

import ia3rt

IDS = token_ids()
SIZES = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
MODELS = {
    "llama": lambda **o: LlamaForCausalLM(LlamaConfig(**SIZES, mlp_bias=True, **o)),
    "mistral": lambda **o: MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, **o)),
    "phi3": lambda **o: Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0, **o)),
    "phi": lambda **o: PhiForCausalLM(PhiConfig(**SIZES, **o)),
    "nemotron": lambda **o: NemotronForCausalLM(NemotronConfig(**SIZES, num_key_value_heads=2, **o)),
    "gpt2": lambda **o: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=128,
            n_embd=32,
            n_layer=2,
            n_head=4,
            **{k.replace("hidden_act", "activation_function"): v for k, v in o.items()},
        )
    ),
    "gpt_neox": lambda **o: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **o)),
}


def make(name, **options):
    torch.manual_seed(0)
    model = MODELS[name](**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def patched(model, backend="torch"):
    runtime = ia3rt.patch(model.to(home(backend)), backend=backend)
    generator = torch.Generator().manual_seed(1)
    for adapter in "bc":
        runtime.add_adapter(
            adapter,
            {site.key: torch.empty(site.width).uniform_(-0.5, 2, generator=generator) for site in runtime.sites},
        )
    return runtime


def truths(runtime, fresh):
    """The base model with each adapter multiplied into its weights, in float64."""
    adapters = runtime._bank.adapters
    return {
        name: scaled(fresh, {site.key: v.double() for site, v in runtime._bank.vectors(adapters[name]).items()})
        for name in adapters
    }


def check(runtime, fresh):
    exact = truths(runtime, fresh)
    for name, truth in exact.items():
        runtime.set_adapter(name)
        torch.testing.assert_close(logits(runtime.model, IDS).double(), logits(truth, IDS), rtol=1e-4, atol=1e-5)
    with runtime.route(["b", None, "c"]):
        mixed = logits(runtime.model, IDS).double()
    for row, truth in enumerate((exact["b"], fresh.double(), exact["c"])):
        torch.testing.assert_close(mixed[row], logits(truth, IDS)[row], rtol=1e-4, atol=1e-5)
