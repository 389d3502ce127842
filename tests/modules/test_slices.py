"""Where q, k and v, or gate and up, are in what a fused projection gives.

The truth is what transformers' own forwards make of the projection's output: its columns' numbers, cut by hand as each
family does it, and what reaches attention and the activation.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from ia3rt.adapters.site import Slices
from ia3rt.modules.sites import find_sites
from ia3rt.modules.slices import find_slices

HEADS, HEAD_DIM, WIDTH = 4, 8, 32
SIZES = dict(hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=2, vocab_size=64, intermediate_size=48)
OLD = dict(n_embd=WIDTH, n_head=HEADS, n_layer=2, vocab_size=64)
FALCON = dict(**SIZES, alibi=False)
DBRX = dict(
    attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
    ffn_config=dict(ffn_hidden_size=32, moe_num_experts=2, moe_top_k=1),
)
SPECIAL = dict(bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)


def blocks(heads_kv):
    """All of q, all of k, all of v."""

    def cut(columns):
        return columns.split([HEADS * HEAD_DIM, heads_kv * HEAD_DIM, heads_kv * HEAD_DIM])

    return cut


def by_head(columns):
    """Each head's q, k and v."""
    return columns.view(HEADS, 3, HEAD_DIM).unbind(1)


def by_group(columns):
    """Falcon's newer one: for each head of k and v the q of its group, its k, its v."""
    grouped = columns.view(2, -1, HEAD_DIM)
    return grouped[:, :-2], grouped[:, -2], grouped[:, -1]


def by_chip(columns):
    """CodeGen's: four parts, one for each chip that it was trained on, and in each q, v, k."""
    q, v, k = columns.view(4, 3, -1).unbind(1)
    return q, k, v


def by_head_without_q(columns):
    """DeepSeek's, whose q comes from elsewhere."""
    k, v = columns.view(HEADS, -1).split([8, 6], -1)
    return columns[:0], k, v


MLA = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6, n_routed_experts=2)
FAMILIES = {
    "gpt2": ("gpt2", OLD, "attn.c_attn", blocks(4)),
    "phi3": ("phi3", dict(**SIZES, num_key_value_heads=2, pad_token_id=0), "qkv_proj", blocks(2)),
    "gpt_neox": ("gpt_neox", SIZES, "query_key_value", by_head),
    "persimmon": ("persimmon", SIZES, "query_key_value", by_head),
    "bloom": ("bloom", dict(hidden_size=WIDTH, n_head=HEADS, n_layer=2, vocab_size=64), "query_key_value", by_head),
    "falcon, grouped": (
        "falcon",
        dict(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
        "query_key_value",
        by_group,
    ),
    "falcon, one head": ("falcon", FALCON, "query_key_value", blocks(1)),
    "falcon, by head": ("falcon", dict(**FALCON, multi_query=False), "query_key_value", by_head),
    "falcon, alibi": ("falcon", dict(SIZES, alibi=True, multi_query=False), "query_key_value", by_head),
    "mpt": ("mpt", dict(d_model=WIDTH, n_heads=HEADS, n_layers=2, vocab_size=64), "Wqkv", blocks(4)),
    "modernbert": ("modernbert", dict(**SIZES, **SPECIAL, pad_token_id=0), "Wqkv", blocks(4)),
    "dbrx": ("dbrx", dict(d_model=WIDTH, n_heads=HEADS, n_layers=2, vocab_size=64, **DBRX), "Wqkv", blocks(2)),
    "gpt_bigcode, one head": ("gpt_bigcode", OLD, "c_attn", blocks(1)),
    "gpt_bigcode, by head": ("gpt_bigcode", dict(**OLD, multi_query=False), "c_attn", by_head),
    "codegen": ("codegen", dict(**OLD, rotary_dim=4), "qkv_proj", by_chip),
    "deepseek_v3": (
        "deepseek_v3",
        dict(**SIZES, **MLA, first_k_dense_replace=2, num_experts_per_tok=1, n_group=1, topk_group=1),
        "kv_b_proj",
        by_head_without_q,
    ),
}


def make(family, config, **options):
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(family, **config, **options)).eval()


def found(model, name, parts):
    modules = dict(model.named_modules())
    paths = [path for path in modules if path.endswith(f".{name}")]
    assert paths
    return find_slices(model, modules, dict.fromkeys(paths, parts))


def columns(slices):
    return slices.inside().tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_where_the_familys_forward_cuts(name):
    family, config, projection, cut = FAMILIES[name]
    model = make(family, config)
    width = next(m.weight.numel() // WIDTH for path, m in model.named_modules() if path.endswith(projection))
    if name == "deepseek_v3":
        width = HEADS * 14
    q, k, v = (part.flatten() for part in cut(torch.arange(width)))
    for slices in found(model, projection, ("k", "v")).values():
        assert columns(slices) == torch.cat([k, v]).sort().values.tolist()
    for part, expected in (("q", q), ("k", k), ("v", v)):
        if len(expected):
            for slices in found(model, projection, (part,)).values():
                assert columns(slices) == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["phi3", "gpt_neox"])
def test_they_are_so_in_half_precision(name, attention, dtype):
    family, config, projection, _ = FAMILIES[name]
    model = make(family, config, attn_implementation=attention)
    assert found(model.to(dtype), projection, ("k", "v")) == found(model.float(), projection, ("k", "v"))


@pytest.mark.parametrize(
    "name", ["gpt2", "phi3", "gpt_neox", "falcon, grouped", "falcon, one head", "dbrx", "gpt_bigcode, by head"]
)
def test_scaling_them_scales_what_reaches_attention(name, monkeypatch):
    family, config, projection, _ = FAMILIES[name]
    config = {**config, "num_hidden_layers": 1} if "num_hidden_layers" in config else config
    model, seen = make(family, config, attn_implementation="sdpa"), []
    attend = F.scaled_dot_product_attention

    def spy(query, key, value, *args, **kwargs):
        seen.append((query.clone(), key.clone(), value.clone()))
        return attend(query, key, value, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    ids = torch.arange(1, 6)[None]
    model(ids)
    plain = seen[0]
    parts = {part: found(model, projection, (part,)) for part in "qkv"}
    seen.clear()
    for path, slices in parts["q"].items():
        scale = torch.ones(sum(len(columns(parts[part][path])) for part in "qkv"))
        for part, factor in (("q", 2.0), ("k", 4.0), ("v", 8.0)):
            scale[parts[part][path].inside()] = factor
        assert slices.columns
        model.get_submodule(path).register_forward_hook(lambda module, args, y, scale=scale: y * scale)
    model(ids)
    for scaled, x, factor in zip(seen[0], plain, (2, 4, 8), strict=True):
        assert torch.equal(scaled, factor * x)


GATED = {
    "phi3": ("phi3", FAMILIES["phi3"][1], "gate_up_proj"),
    "glm": ("glm", dict(**SIZES, num_key_value_heads=2, head_dim=8, pad_token_id=0), "gate_up_proj"),
    "modernbert": ("modernbert", FAMILIES["modernbert"][1], "mlp.Wi"),
}


@pytest.mark.parametrize("name", GATED)
def test_the_gate_goes_through_the_activation(name):
    family, config, projection = GATED[name]
    model, seen = make(family, config), []
    paths = found(model, projection, ("gate",))
    path, gate = next(iter(paths.items()))
    (up,) = set(found(model, projection, ("up",)).values())
    assert sorted(columns(gate) + columns(up)) == list(range(96))
    around = model.get_submodule(path.rpartition(".")[0])
    activation = next(m for each, m in around.named_children() if each in ("activation_fn", "act"))
    activation.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    ids = torch.arange(1, 6)[None]
    model(ids)
    plain, scale = seen[0], torch.ones(96)
    seen.clear()
    scale[up.inside()], scale[gate.inside()] = 8.0, 2.0
    model.get_submodule(path).register_forward_hook(lambda module, args, y: y * scale)
    model(ids)
    assert torch.equal(seen[0], 2 * plain)


class Attention(nn.Module):
    """With a projection of q, k and v, called with a tensor alone, and what is left to a subclass."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.attend(*self.qkv(x).chunk(3, -1)))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Linear(Attention):
    """Without softmax, where k is as v."""

    def attend(self, q, k, v):
        return (q @ k.transpose(-1, -2)).tril() @ v


class OnlyThirds(Attention):
    def attend(self, q, k, v):
        return v


class OneColumnMore(Attention):
    """One of the columns of k is multiplied by one of v's."""

    def attend(self, q, k, v):
        return super().attend(q, k, torch.cat([v[..., :-1], v[..., -1:] * k[..., -1:]], -1))


class Bilinear(nn.Module):
    """Without an activation, where either half may be the gate."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(12, 8)

    def forward(self, x):
        gate, up = self.qkv(x).chunk(2, -1)
        return self.out(gate * up)


class TimeFirst(Attention):
    def forward(self, x):
        q, k, v = self.qkv(x.transpose(0, 1)).transpose(0, 1).chunk(3, -1)
        return self.out(self.attend(q, k, v))


def test_a_module_that_takes_a_tensor_alone():
    torch.manual_seed(0)
    slices = find_sites(nn.ModuleDict({"attention": Attention()}), {"qkv": ("v", "k")})[0].slices
    assert slices == Slices(("k", "v"), ((8, 24),))


@pytest.mark.parametrize(
    ("cls", "parts", "sentence"),
    [
        (Linear, ("v",), "the Linear around it does something else with them"),
        (OnlyThirds, ("v",), "the OnlyThirds around it does something else"),
        (OneColumnMore, ("v",), "the OneColumnMore around it does something else"),
        (Attention, ("gate",), "which columns of the output of 'attention.qkv' are gate and up: the Attention around"),
        (Bilinear, ("up",), "the Bilinear around it does something else"),
        (Bilinear, ("k", "v"), "are q, k and v: the Bilinear around it does something else"),
        (TimeFirst, ("k",), r"fails: the projection gives a tensor of shape \(3, 8, 24\) for 8 rows"),
        (nn.Sequential, ("k",), "the Sequential around it does something else"),
    ],
)
def test_what_cannot_be_seen_is_refused(cls, parts, sentence):
    torch.manual_seed(0)
    around = nn.Sequential() if cls is nn.Sequential else cls()
    if cls is nn.Sequential:
        around.add_module("qkv", nn.Linear(8, 24))
    model = nn.ModuleDict({"attention": around})
    with pytest.raises(ValueError, match=f"{sentence}.* Name the whole module, with None for its slices"):
        find_sites(model, {"qkv": parts})
    assert not around._modules["qkv"]._forward_hooks and not around._forward_pre_hooks


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            {"c_attn": ("key",)},
            r"slices \('key',\) of module 'h.0.attn.c_attn': they are some of 'q', 'k' and 'v', or of",
        ),
        ({"c_attn": ()}, r"slices \(\) of module"),
        ({"c_attn": ("k", "up")}, r"slices \('k', 'up'\)"),
        ({"c_attn": ("k",), "attn.c_attn": None}, "gives module 'h.0.attn.c_attn' other slices by one name than by"),
        (
            {"mlp.c_proj": ("up",)},
            r"'h.0.mlp.c_proj' wears its vector at its input, and slices \('up',\) are of an out",
        ),
        ({"nothing": ("k",)}, "no IA³ site found"),
    ],
)
def test_names_that_mean_nothing(names, sentence):
    with pytest.raises(ValueError, match=sentence):
        find_sites(make("gpt2", OLD), names)


def test_a_part_that_a_projection_lacks():
    family, config, projection, _ = FAMILIES["deepseek_v3"]
    with pytest.raises(ValueError, match="kv_b_proj' has no slice 'q': those of its output are k, v"):
        find_sites(make(family, config), {projection: ("q",)})


def test_a_model_without_weights_and_a_module_that_its_forward_does_not_reach():
    with torch.device("meta"):
        model = make("gpt2", OLD)
    with pytest.raises(ValueError, match="the slices of 'h.0.attn.c_attn' are: the model has no weights yet"):
        find_sites(model, {"c_attn": ("k",)})
    crossed = make("gpt2", dict(**OLD, add_cross_attention=True))
    sentence = "'h.0.crossattention.c_attn' are q, k and v: running the GPT2Attention around it on 1 tokens fails"
    with pytest.raises(ValueError, match=sentence):
        find_sites(crossed, {"c_attn": ("k",)})
    assert len(find_sites(crossed, {"h.0.attn.c_attn": ("k",)})) == 1
    with pytest.raises(
        ValueError, match="TimeFirst around it, which the model's forward with input_ids does not reach,"
    ):
        find_sites(nn.ModuleDict({"attention": TimeFirst()}), {"qkv": ("k",)})


def test_looking_changes_nothing():
    model = make("gpt2", OLD).train()
    before, random = [dict(vars(module)) for module in model.modules()], torch.get_rng_state()
    found(model, "attn.c_attn", ("k",))
    assert torch.equal(torch.get_rng_state(), random)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert all(module.training for module in model.modules()) and all(p.grad is None for p in model.parameters())
    with torch.inference_mode():
        assert found(model, "attn.c_attn", ("k",))
    with torch.no_grad():
        assert found(model, "attn.c_attn", ("k",))
