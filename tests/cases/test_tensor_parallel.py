"""Tensor parallelism splits layers over processes: each multiplies its part of a vector, and together they are one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families.table import FAMILIES
from safetensors.torch import load_file
from tiny import generated, logits, peft_model, peft_vectors, save_each, scaled, tiny_model, token_ids
from two_processes import run_in_two

import ia3rt

IDS = token_ids(4) % 99  # a vocabulary that all of them have
TARGETS = {
    "llama": {},
    "phi3": dict(target_modules=["qkv_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
WAYS = ["llama by transformers", "llama by torch", "phi3 by transformers"]
ROWS = ["b", None, "cb", "c"]
OTHERS = {
    "llama": {
        ("model.layers.0.self_attn.q_proj", "out"): 64,
        ("model.layers.0.self_attn.k_proj", "in"): 64,
        ("model.layers.0.self_attn.o_proj", "out"): 64,
        ("model.layers.1.self_attn.o_proj", "in"): 64,
        ("model.layers.1.mlp.up_proj", "in"): 64,
        ("model.layers.1.mlp.down_proj", "in"): 96,
        ("lm_head", "in"): 64,
    },
    "phi3": {
        ("model.layers.0.self_attn.qkv_proj", "in"): 32,
        ("model.layers.0.self_attn.o_proj", "out"): 32,
        ("model.layers.1.mlp.gate_up_proj", "out"): 96,
        ("lm_head", "out"): 100,
    },
}


def made(family):
    if family == "llama":
        return tiny_model()
    even = {**FAMILIES[family].config, "vocab_size": 100}  # earlier transformers split no odd one
    return replace(FAMILIES[family], config=even).build()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes saw, by its rank; and the folder that they read from and wrote to."""
    folder = tmp_path_factory.mktemp("processes")
    for family, targets in TARGETS.items():
        made(family).save_pretrained(folder / family)
        save_each(peft_model(made(family), "llama", "bc", **targets), folder / f"{family} adapters")
        whole = ia3rt.patch(made(family))
        whole.add_adapter("others", others(family))
        whole.save_adapter("others", folder / f"{family} others")
    run_in_two("tensor_parallel_process.py", folder)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def others(family):
    generator = torch.Generator().manual_seed(5)
    return {key: torch.empty(width).uniform_(0.5, 1.5, generator=generator) for key, width in OTHERS[family].items()}


class Truth:
    """A whole model with vectors in its weights, in float64, by the formula of each mix."""

    def __init__(self, family):
        self.model = made(family)
        wrapped = peft_model(self.model, "llama", "bc", **TARGETS[family])
        self.b, self.c = (peft_vectors(wrapped, name) for name in "bc")

    def of(self, what):
        b, c = self.b, self.c
        scales = {
            None: {},
            "b": b,
            "c": c,
            "cb": {key: b[key] * c[key] for key in b},
            "linear": {key: 0.3 * b[key] + 0.5 * c[key] for key in b},
        }
        return scaled(self.model, scales[what])


def worn_by_token(truth, index):
    """Logits where each token wears b, nothing or c: what a layer gets or gives is multiplied by a hook."""
    model = truth.of(None)
    for (path, side), b in truth.b.items():
        scale = torch.stack([b, torch.ones_like(b), truth.c[path, side]])[index]
        layer = model.get_submodule(path)
        if side == "in":
            layer.register_forward_pre_hook(lambda module, args, scale=scale: (args[0] * scale,))
        else:
            layer.register_forward_hook(lambda module, args, y, scale=scale: y * scale)
    return logits(model, IDS)


def difference(a, b):
    return float((a.double() - b.double()).abs().max())


@pytest.mark.parametrize("way", WAYS)
def test_both_processes_compute_what_one_model_does(processes, way):
    _, ranks = processes
    truth, ids = Truth(way.split()[0]), IDS
    of_base = difference(ranks[0][way]["base"], logits(truth.of(None), ids))
    expected = {"one": truth.of("b"), "product": truth.of("cb"), "linear": truth.of("linear")}
    for what, model in expected.items():
        for seen in (what, f"{what}, with gradients"):
            for rank in ranks:
                off = difference(rank[way][seen], logits(model, ids))
                assert off < 1e-5 and off < 8 * of_base, seen
    assert difference(logits(truth.of("b"), ids), logits(truth.of("c"), ids)) > 1e-2


@pytest.mark.parametrize("way", WAYS)
def test_rows_and_tokens_wear_their_own(processes, way):
    _, ranks = processes
    truth, ids = Truth(way.split()[0]), IDS
    by_row = torch.stack([logits(truth.of(what), ids[row : row + 1])[0] for row, what in enumerate(ROWS)])
    by_token = worn_by_token(truth, torch.arange(28).view(4, 7) % 3)
    for rank in ranks:
        assert difference(rank[way]["rows"], by_row) < 1e-5
        assert difference(rank[way]["rows again"], by_row) < 1e-5
        assert difference(rank[way]["tokens"], by_token) < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_generation_follows_the_rows(processes, way):
    _, ranks = processes
    truth, ids = Truth(way.split()[0]), IDS
    mask, settings = torch.ones(1, 7), dict(max_new_tokens=4, do_sample=False)
    alone = [generated(truth.of(what), ids[row : row + 1], mask, **settings) for row, what in enumerate(ROWS)]
    for rank in ranks:
        assert torch.equal(rank[way]["generated"], torch.cat(alone))


@pytest.mark.parametrize("way", WAYS)
def test_the_processes_agree_to_the_bit(processes, way):
    _, (first, second) = processes
    for what in set(first[way]) - {"part", "explained"}:
        assert torch.equal(first[way][what], second[way][what]), what


@pytest.mark.parametrize("way", ["llama by transformers", "llama by torch"])
def test_each_process_multiplies_its_part(processes, way):
    _, ranks = processes
    truth = Truth("llama").of("b")
    path, whole = ranks[0][way]["part"][0], []
    hook = truth.get_submodule(path).register_forward_hook(lambda module, args, y: whole.append(y))
    logits(truth, IDS)
    hook.remove()
    parts = [rank[way]["part"][1] for rank in ranks]
    assert [part.shape[-1] for part in parts] == [16, 16]
    assert difference(torch.cat(parts, -1), whole[0]) < 1e-5
    assert "of the vector, 16 to 31 in this process" in " ".join(ranks[1][way]["explained"].split())


@pytest.mark.parametrize("family", TARGETS)
def test_one_process_alone_saves_whole_vectors(processes, family):
    folder, _ = processes
    saved = load_file(folder / f"{family} saved" / "adapter_model.safetensors")
    original = load_file(folder / f"{family} adapters" / "b" / "adapter_model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in saved)


@pytest.mark.parametrize("family", OTHERS)
def test_sites_that_come_with_an_adapter_are_split_too(processes, family):
    _, ranks = processes
    truth = scaled(made(family), {key: vector.double() for key, vector in others(family).items()})
    for rank in ranks:
        for seen in rank["late"][family].values():
            assert difference(seen, logits(truth, IDS)) < 1e-5


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (
            "bias",
            "o_proj' is tensor-parallel and wears no vector at its output: transformers adds its bias after the sum",
        ),
        (
            "embedding",
            "embed_tokens' is tensor-parallel and wears no vector at its output: how Embedding computes",
        ),
        ("trained", "is tensor-parallel, and ia3rt does not train beside it"),
        ("merged", "its weight is split over processes"),
        ("slices", "is tensor-parallel, and where its slices ('k',) are is seen on a whole layer only"),
        ("triton", "patch(model, backend='torch')"),
        ("packed", "what transformers' PackedColwiseParallel makes of its input and its output is not known"),
        ("sequence", "what transformers' SequenceParallel makes of its input and its output is not known"),
        ("mesh", "is not one run of its outputs or of its inputs: weight [Replicate(), Shard(dim=0)]"),
        ("forward", "it has a forward of its own, set by other code, which would hide its vectors"),
        ("placed", "the input at 0 (input, width 4) is placed [Shard(dim=0)] over the processes"),
        ("after", "DTensor"),
    ],
)
def test_what_is_not_supported_is_said_in_each_process(processes, what, words):
    _, ranks = processes
    for rank in ranks:
        assert words in rank["refusals"][what]
