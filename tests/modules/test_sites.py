"""Which modules are found, by structure and by PEFT's names."""

import re

import peft
import pytest
import torch
from tiny import TARGETS, tiny_model
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import ia3rt
from ia3rt.modules.sites import find_sites

SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)


def sides(sites):
    return {site.path: site.side for site in sites}


def pefts_sides(model, **config):
    wrapped = peft.get_peft_model(model, peft.IA3Config(**config)).get_base_model()
    return {p: "in" if m.is_feedforward else "out" for p, m in wrapped.named_modules() if hasattr(m, "ia3_l")}


@pytest.mark.parametrize("family", TARGETS)
def test_by_default_the_sites_are_those_of_pefts_defaults(family):
    assert sides(find_sites(tiny_model(family))) == pefts_sides(tiny_model(family), **TARGETS[family])


def test_widths_are_those_of_the_scaled_side():
    widths = {site.path.rpartition(".")[2]: site.width for site in find_sites(tiny_model("llama"))}
    assert widths == {"k_proj": 32, "v_proj": 32, "down_proj": 96}
    widths = {site.path.split(".", 3)[3]: site.width for site in find_sites(tiny_model("gpt2"))}
    assert widths == {"attn.c_attn": 192, "mlp.c_proj": 256}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            lambda: GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=32, **SIZES)),
            {"attention.query_key_value": "out", "mlp.dense_4h_to_h": "in"},
        ),
        (
            lambda: Phi3ForCausalLM(Phi3Config(vocab_size=32, pad_token_id=0, **SIZES)),
            {"self_attn.qkv_proj": "out", "mlp.down_proj": "in"},
        ),
    ],
)
def test_other_decoders_are_found_by_structure(model, expected):
    found = {re.sub(r".*layers\.0\.", "", path): side for path, side in sides(find_sites(model())).items()}
    assert found == expected


def test_an_encoder_decoder_is_searched_as_a_whole():
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    found = sides(find_sites(T5ForConditionalGeneration(config)))
    assert sorted(path.rpartition(".")[2] for path in found) == ["k", "k", "k", "v", "v", "v", "wo", "wo"]
    assert {path.partition(".")[0] for path in found} == {"encoder", "decoder"}


class Text(nn.Module):
    """What writes text: it keeps a cache for that."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(4, 8), nn.Linear(8, 4)
        self.listener = nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)})

    def forward(self, x, use_cache=False):
        return self.down_proj(self.up_proj(self.listener.fc2(self.listener.fc1(x))))


class Encoder(Text):
    """The same without a cache."""

    def forward(self, x):
        return super().forward(x)


class Towers(nn.Module):
    """Text beside a vision tower of the same shape."""

    def __init__(self, text):
        super().__init__()
        self.vision = nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)})
        self.text = text

    def get_decoder(self):
        return self.text

    def get_encoder(self, modality):
        return self.text.listener if modality == "audio" else self


def test_what_sees_and_hears_is_left_alone_beside_a_text_decoder():
    assert sides(find_sites(Towers(Text()))) == {"text.down_proj": "in"}


def test_a_text_encoder_is_one_of_two_towers():
    assert sides(find_sites(Towers(Encoder()))) == {
        "vision.fc2": "in",
        "text.down_proj": "in",
        "text.listener.fc2": "in",
    }


@pytest.mark.parametrize("names", [["q_proj", "mlp.up_proj"], {"q_proj", "mlp.up_proj"}, r".*(q_proj|mlp\.up_proj)"])
@pytest.mark.parametrize("feedforward", [["mlp.up_proj"], {"up_proj"}, r".*\.up_proj", [], None])
def test_names_match_as_in_peft(names, feedforward):
    found = sides(find_sites(tiny_model(), names, feedforward))
    # PEFT needs feedforward_modules; without it ours are those of the structure, and up_proj is none.
    pefts = list(feedforward) if isinstance(feedforward, set) else feedforward or []
    config = peft.IA3Config(target_modules=names)
    config.feedforward_modules = pefts
    wrapped = peft.get_peft_model(tiny_model(), config).get_base_model()
    assert found == {p: "in" if m.is_feedforward else "out" for p, m in wrapped.named_modules() if hasattr(m, "ia3_l")}


def test_all_linear_is_all_but_the_output_embedding():
    names = {path.rpartition(".")[2] for path in sides(find_sites(tiny_model(), "all-linear"))}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_excluded_modules_are_left_out():
    found = sides(find_sites(tiny_model(), exclude_modules=r".*layers\.0\..*"))
    assert found and all(".1." in path for path in found)


def test_a_name_matches_whole_components_only():
    model = nn.ModuleDict({"pre_fc": nn.Linear(4, 4), "fc": nn.Linear(4, 4)})
    assert sides(find_sites(model, ["pre_fc", "fc"], ["fc"])) == {"pre_fc": "out", "fc": "in"}


def test_structural_input_sites_stay_so_where_only_targets_are_named():
    assert sides(find_sites(tiny_model(), ["v_proj", "down_proj"]))["model.layers.0.mlp.down_proj"] == "in"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(target_modules=["nothing"]),
            r"no IA³ site found in LlamaForCausalLM with target_modules=\['nothing'\].*k_",
        ),
        (dict(target_modules=["norm"]), "'model.norm' is a LlamaRMSNorm, which wears no vector"),
        (
            dict(target_modules=["embed_tokens"], feedforward_modules=["embed_tokens"]),
            "'model.embed_tokens' is an embedding, whose input are indices: it wears a vector at its output",
        ),
        (
            dict(target_modules=["k_proj"], feedforward_modules=["down_proj"]),
            "down_proj', which target_modules does not",
        ),
        (dict(feedforward_modules=["down_proj"]), "feedforward_modules needs target_modules"),
        (dict(exclude_modules=".*"), "no IA³ site found"),
        (dict(target_modules=3), "target_modules=3: modules are named by .*, and 3 is of type int"),
        (
            dict(target_modules=["k_proj", 3]),
            r"target_modules=\['k_proj', 3\]: .*, and 3 is of type int",
        ),
        (dict(target_modules="("), r"target_modules='\(' is no regular expression, as which a string is read: missing"),
        (
            dict(target_modules={"k_proj": 5}),
            "target_modules gives 'k_proj' the slices 5: they are some of",
        ),
        (dict(target_modules={"k_proj": (5,)}), r"target_modules gives 'k_proj' the slices \(5,\)"),
        (
            dict(target_modules=["k_proj"], feedforward_modules=[None]),
            r"feedforward_modules=\[None\]: modules are",
        ),
        (dict(exclude_modules="["), r"exclude_modules='\[' is no regular expression"),
    ],
)
def test_what_cannot_be_found_is_a_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        find_sites(tiny_model(), **arguments)


@pytest.mark.parametrize("lazy", [nn.LazyLinear(4), nn.LazyConv1d(4, 1)], ids=["linear", "convolution"])
def test_a_layer_without_weights_yet_says_so_and_is_found_when_it_has_them(lazy):
    model, x = nn.Sequential(lazy), torch.randn(3, 5, 5)
    sentence = "module '0' is a Lazy.*, which has no weights yet: run a forward of the model once before patch()"
    with pytest.raises(ValueError, match=sentence):
        ia3rt.patch(model, target_modules=["0"])
    runtime = ia3rt.patch(model)
    with pytest.raises(ValueError, match=f"adapter 'a' does not fit: {sentence}"):
        runtime.add_adapter("a", {("0", "out"): torch.ones(4)})
    runtime.unpatch()
    model(x)
    assert [site.width for site in ia3rt.patch(model, target_modules=["0"]).sites] == [4]
