"""Attentions are recognised by what they compute, and wear their projections' vectors where they rotate q and k."""

import copy
import functools
import inspect
import sys
from contextlib import nullcontext

import peft
import pytest
import torch
from tiny import generated, logits, peft_vectors, randomize, save_each, scaled, token_ids
from torch import nn
from transformers import (
    DynamicCache,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from where import DEVICE, home

import ia3rt
from ia3rt.modules.layer import IA3Layer
from ia3rt.modules.qkv import IA3QKV
from ia3rt.modules.qkv_forms import form_of_class

IDS = token_ids()
SUM = {"b": 0.25, "d": -0.7}
ROWS = ["b", None, ["c", "d"]]
SEPARATE = {
    "llama": (LlamaConfig, LlamaForCausalLM, modeling_llama),
    "mistral": (MistralConfig, MistralForCausalLM, modeling_mistral),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, modeling_qwen2),
}
MODULE = {"phi3": modeling_phi3, "gpt_neox": modeling_gpt_neox, **{name: made[2] for name, made in SEPARATE.items()}}
ATTENTION = {
    "phi3": modeling_phi3.Phi3Attention,
    "gpt_neox": modeling_gpt_neox.GPTNeoXAttention,
    "llama": modeling_llama.LlamaAttention,
    "mistral": modeling_mistral.MistralAttention,
    "qwen2": modeling_qwen2.Qwen2Attention,
}
PROJECTIONS = {name: ["k_proj", "v_proj"] for name in SEPARATE} | {
    "phi3": ["qkv_proj"],
    "gpt_neox": ["query_key_value"],
}
PROJECTION = {name: projections[0] for name, projections in PROJECTIONS.items()}
SECOND = dict.fromkeys(PROJECTIONS, "down_proj") | {"gpt_neox": "dense_4h_to_h"}


def make(family, dtype=torch.float32, **options):
    """Two layers, those of the fused projections with biases, and heads that rotate a part of their numbers."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    if family == "phi3":
        rope = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.75)
        config = Phi3Config(**sizes, num_key_value_heads=2, rope_parameters=rope, pad_token_id=0, **options)
        model = Phi3ForCausalLM(config)
    elif family in SEPARATE:
        made, cls, _ = SEPARATE[family]
        model = cls(made(**sizes, num_key_value_heads=2, pad_token_id=0, **options))
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def with_peft(model, family):
    config = dict(
        target_modules=[*PROJECTIONS[family], SECOND[family]],
        feedforward_modules=[SECOND[family]],
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.IA3Config(**config), adapter_name="b")
    for name in "cd":
        wrapped.add_adapter(name, peft.IA3Config(**config))
    randomize(wrapped, seed=2)
    wrapped.base_model.add_weighted_adapter(["b", "d"], list(SUM.values()), "sum")
    return wrapped.eval()


def patched(model, wrapped, folder, backend="triton"):
    runtime = ia3rt.patch(model.to(home(backend)), backend=backend)
    for path in save_each(wrapped, folder):
        if path.name != "sum":
            runtime.load_adapter(path)
    return runtime


# Mistral's and Qwen2's differ from Llama's in an argument of the attention.
@pytest.fixture(
    params=[pytest.param(x, marks=[pytest.mark.slow] if x in ("mistral", "qwen2") else []) for x in PROJECTIONS]
)
def family(request):
    return request.param


@pytest.fixture
def pair(family, tmp_path):
    """A PEFT model with three adapters, and a Runtime over the same model that loaded their files."""
    model = make(family)
    wrapped = with_peft(model, family)
    return wrapped, patched(model, wrapped, tmp_path)


def peft_set(wrapped, spec):
    names = ["sum"] if isinstance(spec, dict) else [spec] if isinstance(spec, str) else spec
    wrapped.base_model.set_adapter(names)


def peft_logits(wrapped, spec, ids=IDS):
    if spec is None:
        with wrapped.disable_adapter():
            return logits(wrapped, ids)
    peft_set(wrapped, spec)
    return logits(wrapped, ids)


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def attentions(model):
    return [module for module in model.modules() if isinstance(module, IA3QKV)]


def test_the_attention_applies_the_vector_that_the_projection_wears(pair, family):
    _, runtime = pair
    assert len(attentions(runtime.model)) == 2
    for attention in attentions(runtime.model):
        assert all(isinstance(getattr(attention, name), IA3Layer) for name in PROJECTIONS[family])
    assert {entry.kernel for entry in ia3rt.explain(runtime.model).sites} == {"rope", "activation"}
    assert not runtime._routing.composes, "no vector is left to torch"


@pytest.mark.parametrize("spec", [None, "b", ["b", "c", "d"], SUM], ids=str)
def test_every_mix_is_pefts(pair, spec):
    wrapped, runtime = pair
    runtime.set_adapter(spec)
    assert_close(logits(runtime.model, IDS), peft_logits(wrapped, spec))


def test_each_row_of_a_mixed_batch_is_pefts_row(pair):
    wrapped, runtime = pair
    with runtime.route(ROWS):
        mixed = logits(runtime.model, IDS)
    for row, spec in enumerate(ROWS):
        assert_close(mixed[row], peft_logits(wrapped, spec)[row])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_rounds_no_more_than_peft(family, dtype, tmp_path):
    model = make(family, dtype)
    wrapped = with_peft(model, family)
    truth = logits(scaled(model, peft_vectors(wrapped, "b")), IDS)
    runtime = patched(model, wrapped, tmp_path)
    runtime.set_adapter("b")
    ours = (logits(runtime.model, IDS).double() - truth).abs()
    theirs = (peft_logits(wrapped, "b").double() - truth).abs()
    assert ours.mean() <= 1.2 * theirs.mean() and ours.max() <= 2 * theirs.max()


def test_each_token_wears_its_own_mix(family, tmp_path):
    model = make(family)
    wrapped = with_peft(model, family)
    expected = patched(copy.deepcopy(model), wrapped, tmp_path, backend="torch")
    fused = patched(model, wrapped, tmp_path)
    assert not attentions(expected.model)
    index = torch.randint(3, IDS.shape, generator=torch.Generator().manual_seed(3))
    for runtime in (expected, fused):
        runtime.route(["b", SUM, None], index)
    assert_close(logits(fused.model, IDS), logits(expected.model, IDS))


@pytest.mark.parametrize("cache", ["dynamic", pytest.param("static", marks=pytest.mark.slow)])
def test_greedy_generation_is_pefts_token_for_token(pair, cache):
    wrapped, runtime = pair
    peft_set(wrapped, SUM)
    runtime.set_adapter(SUM)
    settings = dict(mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    expected = generated(wrapped, IDS, **settings)
    assert torch.equal(generated(runtime.model, IDS, cache_implementation=cache, **settings), expected)


@pytest.mark.slow
def test_left_padding_changes_no_row(pair):
    _, runtime = pair
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), IDS], dim=1)
    padded[2] = torch.cat([torch.zeros(4, dtype=torch.long), IDS[2, :5]])
    mask = padded.ne(0).long()
    settings = dict(max_new_tokens=4, do_sample=False)
    with runtime.route(ROWS):
        tokens = generated(runtime.model, padded, mask, **settings)
    for row, spec in enumerate(ROWS):
        runtime.set_adapter(spec)
        prompt = padded[row : row + 1, mask[row].bool()]
        expected = generated(runtime.model, prompt, torch.ones_like(prompt), **settings)
        assert torch.equal(tokens[row, -4:], expected[0, -4:])


@pytest.mark.slow
def test_under_torch_compile_switching_compiles_nothing(pair):
    wrapped, runtime = pair
    compilations = 0

    def count(graph, _):
        nonlocal compilations
        compilations += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(runtime.model, backend=count, fullgraph=True)
    for spec in ("b", None, SUM, ["b", "c"]):
        runtime.set_adapter(spec)
        assert_close(logits(compiled, IDS), peft_logits(wrapped, spec))
    assert compilations == 1
    for rows in (ROWS, ["d", "d", None]):
        runtime.route(rows)
        ours = logits(compiled, IDS)
        assert_close(ours, logits(runtime.model, IDS))
    assert compilations == 2
    torch._dynamo.reset()


@pytest.mark.slow
def test_gradients_reach_the_vectors_and_the_model(family, tmp_path):
    model = make(family)
    wrapped = with_peft(model, family)
    gradients = []
    for backend in ("torch", "triton"):
        runtime = patched(copy.deepcopy(model), wrapped, tmp_path, backend)
        runtime.set_adapter(["b", "c"])
        ids = IDS.to(runtime.model.device)
        embeddings = runtime.model.get_input_embeddings()(ids).detach().requires_grad_()
        runtime.train_adapter("b")
        runtime.model(inputs_embeds=embeddings, labels=ids).loss.backward()
        trained = [embeddings, *(p for p in runtime.model.parameters() if p.requires_grad)]
        gradients.append([parameter.grad.cpu() for parameter in trained])
    assert len(gradients[0]) == 3 + 2 * len(PROJECTIONS[family]) and all(gradient.any() for gradient in gradients[1])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_is_the_one_of_the_models_config(family, implementation, tmp_path):
    """With dropout, in training: the same random numbers."""
    option = "attention_dropout"
    model = make(family, attn_implementation=implementation, **{option: 0.5}).to(DEVICE)
    fresh = copy.deepcopy(model)
    ia3rt.patch(model, backend="triton")
    outputs = []
    for each in (model, fresh):
        torch.manual_seed(5)
        with torch.no_grad():
            outputs.append(each.train()(IDS.to(DEVICE), output_attentions=implementation == "eager"))
    assert_close(outputs[0].logits, outputs[1].logits)
    if implementation == "eager":
        assert len(outputs[0].attentions) == 2
        for ours, theirs in zip(outputs[0].attentions, outputs[1].attentions, strict=True):
            assert_close(ours, theirs)


def test_hooks_on_the_projection_run_and_unpatch_gives_the_class_back(pair, family):
    _, runtime = pair
    model = runtime.model
    names = [name for name, _ in model.named_modules()]
    attention = attentions(model)[0]
    seen = []
    handle = getattr(attention, PROJECTION[family]).register_forward_hook(lambda *_: seen.append(1))
    runtime.set_adapter("b")
    logits(model, IDS)
    handle.remove()
    assert seen == [1]
    assert isinstance(attention, ATTENTION[family])
    runtime.unpatch()
    assert type(attention) is ATTENTION[family]
    assert names == [name for name, _ in make(family).named_modules()]
    assert not [name for name in vars(attention) if name.startswith("ia3")]
    assert torch.equal(logits(model, IDS), logits(make(family).to(DEVICE), IDS))


def test_a_projection_may_be_of_any_class(family, tmp_path):
    """As a quantised one is: its own forward runs, and the vector is applied behind it."""

    class Quantised(nn.Linear):
        def forward(self, x):
            return super().forward(x.round(decimals=2))

    model = make(family)
    for module in list(model.modules()):
        if type(module) is ATTENTION[family]:
            getattr(module, PROJECTION[family]).__class__ = Quantised
    wrapped = with_peft(make(family), family)
    expected = patched(copy.deepcopy(model), wrapped, tmp_path, backend="torch")
    fused = patched(model, wrapped, tmp_path)
    assert len(attentions(model)) == 2
    for runtime in (expected, fused):
        runtime.set_adapter("b")
    assert_close(logits(fused.model, IDS), logits(expected.model, IDS))


@pytest.mark.slow
def test_a_projection_may_wear_an_input_vector_too(family):
    model = make(family).to(DEVICE)
    runtime = ia3rt.patch(model, backend="triton")
    path = next(site.path for site in runtime.sites if site.path.endswith(PROJECTION[family]))
    widths = model.get_submodule(path).weight.shape
    vectors = {(path, "in"): torch.rand(widths[1]), (path, "out"): torch.rand(widths[0])}
    runtime.add_adapter("both", vectors)
    runtime.set_adapter("both")
    assert isinstance(model.get_submodule(path), IA3Layer) and len(attentions(model)) == 2
    truth = scaled(make(family), {key: vector.double() for key, vector in vectors.items()})
    torch.testing.assert_close(logits(model, IDS).double(), logits(truth, IDS), rtol=1e-4, atol=1e-5)


def _computes_something_else(original, monkeypatch):
    class Doubled(original):
        def forward(self, *args, **kwargs):
            output, weights = super().forward(*args, **kwargs)
            return 2 * output, weights

    return Doubled


def _another_rotary(original, monkeypatch):
    module = sys.modules[original.__module__]
    theirs = module.apply_rotary_pos_emb
    monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda q, k, cos, sin: theirs(k, q, cos, sin)[::-1])
    return original


def _another_half(original, monkeypatch):
    module = sys.modules[original.__module__]
    monkeypatch.setattr(module, "rotate_half", lambda x: x.flip(-1))
    return original


def _decorated(original, monkeypatch):
    class Decorated(original):
        @functools.wraps(original.forward)
        def forward(self, *args, **kwargs):
            output, weights = original.forward(self, *args, **kwargs)
            return -output, weights

    return Decorated


@pytest.mark.parametrize("change", [_computes_something_else, _another_rotary, _another_half, _decorated])
def test_an_attention_that_computes_something_else_keeps_its_forward(family, change, monkeypatch, tmp_path):
    model = make(family)
    cls = change(ATTENTION[family], monkeypatch)
    for module in model.modules():
        if type(module) is ATTENTION[family]:
            module.__class__ = cls
    wrapped = with_peft(model, family)
    runtime = patched(model, wrapped, tmp_path)
    assert not attentions(model)
    projections = [m for name, m in model.named_modules() if name.endswith(tuple(PROJECTIONS[family]))]
    assert len(projections) == 2 * len(PROJECTIONS[family]) and all(
        isinstance(module, IA3Layer) for module in projections
    )
    runtime.set_adapter("b")
    assert_close(logits(model, IDS), peft_logits(wrapped, "b"))


def test_a_forward_set_on_the_instance_is_not_hidden(family, tmp_path):
    model = make(family)
    for module in model.modules():
        if type(module) is ATTENTION[family]:
            module.forward = functools.partial(type(module).forward, module)
    ia3rt.patch(model.to(DEVICE), backend="triton")
    assert not attentions(model)


@pytest.mark.parametrize("family", ["phi3", *SEPARATE], indirect=True)
def test_a_cache_may_be_passed_by_its_earlier_name(family):
    model = make(family).to(DEVICE)
    attention, states = model.model.layers[0].self_attn, torch.randn(1, 3, 64).to(DEVICE)
    angles = model.model.rotary_emb(states, torch.arange(3, device=DEVICE)[None])

    is_earlier = "cache" in inspect.signature(ATTENTION[family].forward).parameters

    def run(**cache):
        warns = is_earlier and type(attention) is ATTENTION[family]
        with torch.no_grad(), pytest.warns(FutureWarning) if warns else nullcontext():
            return attention(states, angles, None, **cache)[0]

    plain, worn = DynamicCache(), DynamicCache()
    expected = run(past_key_values=plain)
    ia3rt.patch(model, backend="triton")
    assert_close(run(past_key_values=worn), expected)
    assert plain.get_seq_length() == worn.get_seq_length() == 3


@pytest.mark.parametrize("family", SEPARATE, indirect=True)
def test_angles_of_another_dtype_or_of_a_part_of_a_head_are_left_to_the_attention(family):
    """Torch computes in the wider dtype, which a kernel would not, and refuses to rotate a part, which a kernel can."""
    model = make(family, torch.bfloat16).to(DEVICE)
    attention, states = model.model.layers[0].self_attn, torch.randn(1, 3, 64).to(DEVICE, torch.bfloat16)
    angles = [angle.float() for angle in model.model.rotary_emb(states, torch.arange(3, device=DEVICE)[None])]
    cos, sin = (angle.to(torch.bfloat16)[..., :8] for angle in angles)

    def raised(angles):
        with torch.no_grad(), pytest.raises(RuntimeError) as error:
            attention(states, position_embeddings=angles, attention_mask=None)
        return str(error.value)

    expected = raised(angles), raised((cos, sin))
    ia3rt.patch(model, backend="triton")
    assert attentions(model)
    assert (raised(angles), raised((cos, sin))) == expected


@pytest.mark.parametrize("targets", [["k_proj"], ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"]], ids=str)
def test_any_of_the_three_projections_may_wear_vectors(targets):
    model = make("qwen2").to(DEVICE)
    runtime = ia3rt.patch(model, backend="triton", target_modules=targets, feedforward_modules=[])
    generator = torch.Generator().manual_seed(1)
    vectors = {site.key: torch.rand(site.width, generator=generator) + 0.5 for site in runtime.sites}
    runtime.add_adapter("some", vectors)
    runtime.set_adapter("some")
    assert len(attentions(model)) == 2 and len(vectors) == 2 * len(targets)
    truth = scaled(make("qwen2"), {key: vector.double() for key, vector in vectors.items()})
    torch.testing.assert_close(logits(model, IDS).double(), logits(truth, IDS), rtol=1e-4, atol=1e-5)


def test_forms_are_recognised_by_what_they_compute():
    from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalAttention

    assert form_of_class(Phi4MultimodalAttention) is form_of_class(modeling_phi3.Phi3Attention) is not None
    forms = [form_of_class(ATTENTION[family]) for family in ATTENTION]
    assert None not in forms and len({id(form) for form in forms}) == len(forms)
    # Qwen3 normalises keys between their projection and their rotation.
    assert form_of_class(Qwen3Attention) is form_of_class(nn.Linear) is form_of_class(nn.ModuleList) is None
