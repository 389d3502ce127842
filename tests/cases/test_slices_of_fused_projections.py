"""IA³ on k and v of a fused projection, or on a half of gate_up_proj: q, or the other half, is left alone."""

import copy

import peft
import pytest
import torch
from tiny import logits, peft_model, peft_vectors, save_each, scaled, tiny_model, token_ids
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM
from where import home

import ia3rt
from ia3rt import Mix

IDS = token_ids()
SLICED = {
    "gpt2": {"c_attn": ("k", "v"), "mlp.c_proj": None},
    "phi3": {"qkv_proj": ("k", "v"), "gate_up_proj": ("up",), "down_proj": None},
}
FREE = {"c_attn": [(64, 192)], "qkv_proj": [(32, 64)], "gate_up_proj": [(48, 96)]}
"""These columns, by transformers' own forwards: 4 heads of 16 in GPT-2, of 8 in Phi-3, which has 2 of k and v."""


def model_of(family):
    if family == "gpt2":
        return tiny_model("gpt2")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = Phi3ForCausalLM(Phi3Config(**sizes, vocab_size=128, num_key_value_heads=2, pad_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def free(site):
    """Which numbers of a site's vector may differ from 1, by hand."""
    mask = torch.zeros(site.width, dtype=torch.bool)
    for start, stop in FREE.get(site.path.rpartition(".")[2], [(0, site.width)]) if site.side == "out" else [(0, None)]:
        mask[start:stop] = True
    return mask


def vectors(runtime, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for site in runtime.sites:
        mask = free(site)
        made[site.key] = torch.ones(site.width)
        made[site.key][mask] = torch.empty(int(mask.sum())).uniform_(-0.5, 2, generator=generator)
    return made


def patched(family, backend="torch"):
    runtime = ia3rt.patch(model_of(family).to(home(backend)), target_modules=SLICED[family], backend=backend)
    for seed, name in enumerate("bc"):
        runtime.add_adapter(name, vectors(runtime, seed))
    return runtime


def truth(family, scales):
    return scaled(model_of(family), {key: scale.double() for key, scale in scales.items()})


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("family", SLICED)
def test_mixes_and_rows(family, backend):
    runtime = patched(family, backend)
    b, c = vectors(runtime, 0), vectors(runtime, 1)
    summed, keys = {}, b.keys()
    for site in runtime.sites:  # a weighted sum: where no adapter acts, as at a q_proj beside k_proj, the model's own
        summed[site.key] = torch.where(free(site), 0.7 * b[site.key] + 0.9 * c[site.key], torch.ones(site.width))
    exact = {
        "b": truth(family, b),
        "product": truth(family, {key: b[key] * c[key] for key in keys}),
        "sum": truth(family, summed),
        "delta": truth(family, {key: 1 + 0.5 * (b[key] - 1) for key in keys}),
    }
    mixes = ["b", ["b", "c"], {"b": 0.7, "c": 0.9}, Mix(("b",), (0.5,), "delta")]
    for name, mix in zip(exact, mixes, strict=True):
        runtime.set_adapter(mix)
        torch.testing.assert_close(
            logits(runtime.model, IDS).double(), logits(exact[name], IDS), rtol=2e-4, atol=1e-4, msg=name
        )
    ids = token_ids(rows=4)
    with runtime.route(mixes):
        mixed = logits(runtime.model, ids).double()
    for row, model in enumerate(exact.values()):
        torch.testing.assert_close(mixed[row], logits(model, ids)[row], rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("family", SLICED)
def test_what_is_saved_loads_in_peft_and_back(family, tmp_path):
    runtime = patched(family)
    runtime.save_adapter("b", tmp_path)
    wrapped = peft.PeftModel.from_pretrained(model_of(family), tmp_path).eval()
    runtime.set_adapter("b")
    assert torch.equal(logits(runtime.model, IDS), logits(wrapped, IDS))
    runtime.load_adapter(tmp_path, "again")
    whole = ia3rt.patch(model_of(family))
    whole.load_adapter(tmp_path, "b")
    whole.set_adapter("b")
    runtime.set_adapter("again")
    assert torch.equal(logits(runtime.model, IDS), logits(wrapped, IDS))
    assert torch.equal(logits(whole.model, IDS), logits(wrapped, IDS))


def test_a_checkpoint_of_the_whole_loads_as_that_where_no_slices_are_named_and_is_refused_where_they_are(tmp_path):
    wrapped = peft_model(tiny_model("gpt2"), "gpt2", "b")
    (folder,) = save_each(wrapped, tmp_path)
    whole = ia3rt.patch(tiny_model("gpt2"))
    whole.load_adapter(folder)
    whole.set_adapter("b")
    assert torch.equal(logits(whole.model, IDS), logits(wrapped, IDS))
    runtime = patched("gpt2")
    runtime.set_adapter("b")
    before = logits(runtime.model, IDS)
    outside = peft_vectors(wrapped, "b")["transformer.h.0.attn.c_attn", "out"][:64]
    sentence = (
        r"adapter 'whole' scales more of 'transformer.h.0.attn.c_attn' than k and v, .* "
        rf"{(outside != 1).sum()} of the 64 other numbers are not 1, the first that of column 0"
    )
    with pytest.raises(ValueError, match=sentence):
        runtime.load_adapter(folder, "whole")
    with pytest.raises(
        ValueError, match=r"lets module 'transformer.h.0.attn.c_attn' wear a vector at slices of its out"
    ):
        runtime.add_adapter("in", {("transformer.h.0.attn.c_attn", "in"): torch.rand(64)})
    assert runtime.adapters == ["b", "c"] and torch.equal(logits(runtime.model, IDS), before)
    with pytest.raises(ValueError, match="adapter 'b' scales more of"):
        ia3rt.patch(wrapped, target_modules=SLICED["gpt2"])
    assert torch.equal(logits(wrapped, IDS), logits(whole.model, IDS))


@pytest.mark.parametrize("family", SLICED)
def test_merged_and_combined_weights_of_the_rest_are_the_models_to_the_bit(family):
    runtime, fresh = patched(family), model_of(family)
    runtime.add_weighted_adapter(["b", "c"], [0.7, 0.9], "sum", "linear")
    for mix in ("sum", {"b": 0.7, "c": 0.9}):
        runtime.merge_adapter(mix)
        for site in runtime.sites:
            if site.side == "out":
                weight, plain = (m.get_submodule(site.path).weight for m in (runtime.model, fresh))
                rows, plain_rows = (w.t() if family == "gpt2" else w for w in (weight, plain))
                assert torch.equal(rows[~free(site)], plain_rows[~free(site)])
                assert not torch.equal(rows[free(site)], plain_rows[free(site)])
        runtime.unmerge_adapter()


def loss_of(model):
    return model(IDS.to(model.device), labels=IDS.to(model.device)).loss


@pytest.mark.parametrize(
    ("family", "backend", "checkpointing"),
    [(family, "torch", how) for family in SLICED for how in (None, False, True)] + [("gpt2", "triton", None)],
)
def test_training_learns_the_slices_and_nothing_else(family, backend, checkpointing):
    """Step for step as in PEFT, whose gradients of the rest are zeroed by hand, by plain descent."""
    runtime = patched(family, backend)
    runtime.add_adapter("new")
    parameters = runtime.train_adapter("new")
    assert [len(p) for p in parameters] == [int(free(site).sum()) for site in runtime.sites]
    model = runtime.model
    if checkpointing is not None:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    names = {site.path: site.side for site in runtime.sites}
    config = peft.IA3Config(
        target_modules=list(names), feedforward_modules=[path for path, side in names.items() if side == "in"]
    )
    wrapped = peft.get_peft_model(model_of(family), config)
    for site in runtime.sites:
        mask = free(site)
        layer = wrapped.get_base_model().get_submodule(site.path)
        layer.ia3_l["default"].register_hook(lambda grad, mask=mask: grad * mask.view(grad.shape))
    optimizers = [
        torch.optim.SGD(each, lr=0.5) for each in (parameters, [p for p in wrapped.parameters() if p.requires_grad])
    ]
    losses = []
    for _ in range(3):
        step = []
        for each, optimizer in zip((model, wrapped), optimizers, strict=True):
            optimizer.zero_grad()
            loss = loss_of(each)
            loss.backward()
            optimizer.step()
            step.append(loss.item())
        losses.append(step)
    ours, pefts = zip(*losses, strict=True)
    assert ours == pytest.approx(pefts, rel=1e-5) and ours[-1] < ours[0]
    runtime.end_training()
    learned = peft_vectors(wrapped, "default")
    for key, vector in runtime.get_adapter("new").vectors.items():
        torch.testing.assert_close(vector.double().cpu(), learned[key], rtol=1e-4, atol=1e-5)


def test_weight_decay_leaves_the_rest_at_one():
    runtime = patched("gpt2")
    runtime.add_adapter("new")
    optimizer = torch.optim.AdamW(runtime.train_adapter("new"), lr=0.1, weight_decay=0.5)
    loss_of(runtime.model).backward()
    optimizer.step()
    runtime.end_training()
    contents = runtime.get_adapter("new").vectors
    for site in runtime.sites:
        assert (contents[site.key][~free(site)] == 1).all() and (contents[site.key][free(site)] != 1).any()


def test_a_trained_slice_beside_another_adapter_in_a_weighted_sum():
    runtime = patched("gpt2")
    runtime.train_adapter("b")
    runtime.set_adapter({"b": 0.7, "c": 0.9})
    b, c = vectors(runtime, 0), vectors(runtime, 1)
    summed = {
        site.key: torch.where(free(site), 0.7 * b[site.key] + 0.9 * c[site.key], torch.ones(site.width))
        for site in runtime.sites
    }
    torch.testing.assert_close(
        logits(runtime.model, IDS).double(), logits(truth("gpt2", summed), IDS), rtol=1e-4, atol=1e-4
    )


def test_a_copied_model_and_unpatch():
    runtime = patched("gpt2")
    copied = ia3rt.patch(copy.deepcopy(runtime.model))
    runtime.set_adapter("b")
    copied.set_adapter("b")
    assert torch.equal(logits(copied.model, IDS), logits(runtime.model, IDS))
    with pytest.raises(ValueError, match="adapter 'q' scales more"):
        copied.add_adapter("q", {"transformer.h.0.attn.c_attn": torch.full((192,), 2.0)})
    assert torch.equal(logits(runtime.unpatch(), IDS), logits(tiny_model("gpt2"), IDS))
    assert str(copied.sites[0]) == "transformer.h.0.attn.c_attn (output, width 192, of which k and v)"
