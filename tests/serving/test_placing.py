"""Which of vLLM's layers a checkpoint's sites are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from loaded_layers import IN, OUT, layer_of, load, parts
from torch import nn
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear
from vllm.model_executor.models.utils import PPMissingLayer, WeightsMapper

from ia3rt.adapters.site import Site
from ia3rt.serving.vllm import layers
from ia3rt.serving.vllm.placing import Layers

UP, OUTER = "layers.1.gate_up_proj", "layers.1.outer"

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def model() -> nn.Module:
    packed = MergedColumnParallelLinear(IN, [OUT, OUT], bias=True)
    load(packed, parts({0: OUT, 1: OUT}))
    outer = ColumnParallelLinear(IN, OUT, bias=True)
    load(outer, parts({None: OUT}))
    block = nn.Module()
    block.gate_up_proj = layer_of(layers.IA3MergedColumnParallelLinear, packed)
    block.outer = layer_of(layers.IA3ColumnParallelLinear, outer)
    made = nn.Module()
    made.layers = nn.ModuleList([PPMissingLayer(), block])
    return made


def find(model: nn.Module, may_grow: bool = True) -> Layers:
    wrapped = {UP: model.layers[1].gate_up_proj, OUTER: model.layers[1].outer, "head": nn.Linear(1, 1)}
    return Layers(model, wrapped, {UP: ["layers.1.gate_proj", "layers.1.up_proj"]}, may_grow, is_pooling=False)


def find_within(model: nn.Module, *, is_pooling: bool) -> Layers:
    """As `find`, where the served model has it as its `model`."""
    whole = nn.Module()
    whole.model = model
    wrapped = {f"model.{UP}": model.layers[1].gate_up_proj, f"model.{OUTER}": model.layers[1].outer}
    packed = {f"model.{UP}": ["model.layers.1.gate_proj", "model.layers.1.up_proj"]}
    return Layers(whole, wrapped, packed, True, is_pooling=is_pooling)


def ones(*sites: Site) -> dict[Site, torch.Tensor]:
    return {site: torch.ones(site.width) for site in sites}


def test_packed_and_whole_layers(model) -> None:
    up, out = Site("layers.1.up_proj", "out", OUT), Site(OUTER, "out", OUT)
    inner = Site(OUTER, "in", IN)
    placed = find(model).place("a", ones(up, out, inner))
    assert placed.keys() == {UP, OUTER}
    assert placed[UP]["out"][0] is None and placed[UP]["out"][1].shape == (OUT,)
    assert placed[OUTER].keys() == {"in", "out"}


def test_names_of_the_checkpoint_are_vllms_by_its_own_mapping(model) -> None:
    renamed = SimpleNamespace(_map_name=lambda name: name.replace("model.language.", ""))
    model.hf_to_vllm_mapper = SimpleNamespace(get_rename_mapper=lambda: renamed)
    assert find(model).place("a", ones(Site("model.language.layers.1.outer", "out", OUT))).keys() == {OUTER}


@pytest.mark.parametrize(
    "rules",
    [
        {"orig_to_new_substr": {".near.": ".outer."}},
        {"orig_to_new_suffix": {".near.weight": ".outer.weight"}},
        {"orig_to_new_substr": {".near": ".outer"}},
        {"orig_to_new_prefix": {"layers.1.near": "layers.1.outer"}},
    ],
)
def test_rules_of_that_mapping_are_for_weights(model, rules) -> None:
    """Whisper's `.fc2.`, say, is no part of the layer's name alone."""
    model.hf_to_vllm_mapper = WeightsMapper(**rules)
    assert find(model).place("a", ones(Site("layers.1.near", "out", OUT))).keys() == {OUTER}


def test_an_embedding_models_adapter_names_layers_from_the_model_on(model) -> None:
    """PEFT saves AutoModel's as `layers.1.up_proj`, what AutoModelForCausalLM has as `model.layers.1.up_proj`."""
    sites = Site("layers.1.up_proj", "out", OUT), Site(OUTER, "in", IN), Site("layers.0.up_proj", "out", OUT)
    whole = [Site(f"model.{site.path}", site.side, site.width) for site in sites]
    for given in (sites, whole):
        placed = find_within(model, is_pooling=True).place("a", ones(*given))
        assert placed.keys() == {f"model.{UP}", f"model.{OUTER}"}
    with pytest.raises(ValueError, match="two vectors for one place"):
        find_within(model, is_pooling=True).place("a", ones(sites[0], whole[0]))
    with pytest.raises(ValueError, match="no such layer"):
        find_within(model, is_pooling=False).place("a", ones(sites[0]))


def test_another_pipeline_stage_has_the_rest(model) -> None:
    assert find(model).place("a", ones(Site("layers.0.up_proj", "out", OUT))) == {}


@pytest.mark.parametrize(
    ("site", "told"),
    [
        (Site("layers.7.up_proj", "out", OUT), "no such layer"),
        (Site("layers.1.nothing", "out", OUT), "no such layer"),
        (Site("layers.1.up_proj", "out", OUT + 1), f"{OUT} wide"),
        (Site("layers.1.up_proj", "in", IN), "no vector at its input"),
        (Site("head", "out", 1), "no vector at its output"),
        (Site(UP, "out", OUT), "made of layers.1.gate_proj, layers.1.up_proj"),
    ],
)
def test_what_does_not_fit_is_told(model, site, told) -> None:
    with pytest.raises(ValueError, match=told) as refused:
        find(model).place("sql", ones(site))
    assert "'sql'" in str(refused.value) and str(site) in str(refused.value)


def test_two_vectors_for_one_place_are_refused(model) -> None:
    renamed = SimpleNamespace(_map_name=lambda name: name.replace("model.language.", ""))
    model.hf_to_vllm_mapper = SimpleNamespace(get_rename_mapper=lambda: renamed)
    for path in ("layers.1.up_proj", OUTER):
        same = Site(path, "out", OUT), Site(f"model.language.{path}", "out", OUT)
        with pytest.raises(ValueError, match="two vectors for one place") as refused:
            find(model).place("sql", ones(*same))
        assert "'sql'" in str(refused.value) and str(same[1]) in str(refused.value)


def test_a_layer_that_can_wear_none_says_why(model) -> None:
    model.layers[1].outer.ia3_refusal = "which runs on something else"
    with pytest.raises(ValueError, match=f"'sql' .* {OUTER} .*, which runs on something else"):
        find(model).place("sql", ones(Site(OUTER, "out", OUT)))
    assert find(model).place("sql", ones(Site("layers.1.up_proj", "out", OUT))).keys() == {UP}


def test_a_compiled_layer_gets_no_table_later(model) -> None:
    site = Site(OUTER, "out", OUT)
    with pytest.raises(ValueError, match="--enforce-eager"):
        find(model, may_grow=False).place("a", ones(site))
    model.layers[1].outer.ia3_table("out")
    assert find(model, may_grow=False).place("a", ones(site)).keys() == {OUTER}
