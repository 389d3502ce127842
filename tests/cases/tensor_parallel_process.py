"""One of two processes that share models by tensor parallelism; writes what it sees, for a test to compare."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # one refusal is of the Triton backend

import torch
import torch.distributed as dist
from tiny import generated, logits, tiny_model, token_ids
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

import ia3rt

FOLDER = Path(sys.argv[1])
IDS = token_ids(4) % 99  # a vocabulary that all of them have
MIXES = {"one": "b", "product": ["b", "c"], "linear": {"b": 0.3, "c": 0.5}}
ROWS = ["b", None, ["c", "b"], "c"]
LAYER = "model.layers.0."
SPLIT = {
    **{f"self_attn.{name}_proj": ColwiseParallel for name in "qkv"},
    "self_attn.o_proj": RowwiseParallel,
    "mlp.gate_proj": ColwiseParallel,
    "mlp.up_proj": ColwiseParallel,
    "mlp.down_proj": RowwiseParallel,
}


def by_transformers(family: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(FOLDER / family, tp_plan="auto").eval()


def by_torch(family: str) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(FOLDER / family).eval()
    for layer in model.model.layers:
        parallelize_module(layer, mesh, {name: style() for name, style in SPLIT.items()})
    return model


def seen(model: nn.Module, family: str) -> dict[str, Any]:
    """What this process computes: logits by what is worn, and what else is the same in all processes."""
    ids, found = IDS, dict[str, Any]()
    base = logits(model, ids)
    runtime = ia3rt.patch(model)
    for name in "bc":
        runtime.load_adapter(FOLDER / f"{family} adapters" / name)
    assert torch.equal(logits(model, ids), base)
    for what, mix in MIXES.items():
        runtime.set_adapter(mix)
        found[what] = logits(model, ids)
        found[f"{what}, with gradients"] = model(ids).logits.detach()
    runtime.set_adapter("b")
    parts: list[Tensor] = []
    first = next(site for site in runtime.sites if site.side == "out").path
    inner = model.get_submodule(first)
    hook = inner.register_forward_hook(lambda module, args, y: parts.append(y))
    logits(model, ids)
    hook.remove()
    found["part"] = first, parts[0]
    with runtime.disable_adapter():
        assert torch.equal(logits(model, ids), base)
    for what in ("rows", "rows again"):
        with runtime.route(ROWS):
            found[what] = logits(model, ids)
    with runtime.route(ROWS):
        found["generated"] = generated(model, ids, torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    with runtime.route(["b", None, "c"], torch.arange(28).view(4, 7) % 3):
        found["tokens"] = logits(model, ids)
    if dist.get_rank() == 1:  # alone: it has all numbers
        runtime.save_adapter("b", FOLDER / f"{family} saved")
    found["explained"] = str(ia3rt.explain(model))
    runtime.delete_adapter("c")
    assert runtime.adapters == ["b"]
    runtime.unpatch()
    assert torch.equal(logits(model, ids), base)
    return {**found, "base": base}


def late(model: nn.Module, family: str) -> dict[str, Tensor]:
    """Logits with vectors at other layers than the usual ones, which come with an adapter."""
    runtime = ia3rt.patch(model)
    runtime.load_adapter(FOLDER / f"{family} others", "others")
    runtime.set_adapter("others")
    return {"others": logits(model, IDS), "others, with gradients": model(IDS).logits.detach()}


def planned(name: str, plan: str) -> nn.Module:
    """A model of which transformers splits one layer by a style of its plans."""
    model, style = tiny_model(), ALL_PARALLEL_STYLES[plan]
    layer = model.model.layers[0].get_submodule(name)
    for parameter in ("weight", "bias"):
        style.shard_param(layer, parameter, mesh)
    style.install_forward(layer, mesh)
    return model


def on_a_mesh_of_two() -> nn.Module:
    model = tiny_model()
    k_proj = model.model.layers[0].self_attn.k_proj
    two = dist.init_device_mesh("cpu", (1, 2))
    for name, parameter in list(k_proj.named_parameters()):
        split = distribute_tensor(parameter.detach(), two, [Replicate(), Shard(0)])
        k_proj.register_parameter(name, nn.Parameter(split))
    return model


def with_a_split_embedding() -> nn.Module:
    return parallelize_module(tiny_model(), mesh, {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())})


def with_a_forward_of_its_own() -> nn.Module:
    model = by_torch("llama")
    model.model.layers[0].self_attn.k_proj.forward = lambda x: x
    return model


def placed_otherwise() -> Tensor:
    """A layer that is given a part of the rows where it has to be given all."""
    layer = parallelize_module(nn.Sequential(nn.Linear(4, 6)), mesh, {"0": ColwiseParallel()})
    runtime = ia3rt.patch(layer, target_modules=["0"], feedforward_modules=["0"])
    runtime.add_adapter("a", {"0": torch.full((4,), 2.0)})
    runtime.set_adapter("a")
    return layer[0].forward(DTensor.from_local(torch.ones(2, 4), mesh, [Shard(0)]))


def parallelised_after() -> Tensor:
    model = tiny_model()
    ia3rt.patch(model)
    parallelize_module(model.model.layers[0], mesh, {name: style() for name, style in SPLIT.items()})
    return logits(model, IDS)


def refusals() -> dict[str, str]:
    """What is said of what is not supported."""
    model = by_transformers("llama")
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a")
    runtime.set_adapter("a")
    before = runtime.adapters, len(runtime.sites)
    refused: dict[str, Callable[[], object]] = {
        "bias": lambda: runtime.add_adapter("late", {(f"{LAYER}self_attn.o_proj", "out"): torch.ones(64)}),
        "embedding": lambda: ia3rt.patch(with_a_split_embedding(), target_modules=["embed_tokens"]),
        "trained": lambda: runtime.train_adapter("a"),
        "merged": runtime.merge_adapter,
        "slices": lambda: ia3rt.patch(by_transformers("llama"), target_modules={"k_proj": ("k",)}),
        "triton": lambda: ia3rt.patch(by_transformers("llama"), backend="triton"),
        "packed": lambda: ia3rt.patch(planned("self_attn.k_proj", "packed_colwise")),
        "sequence": lambda: ia3rt.patch(planned("self_attn.v_proj", "sequence_parallel")),
        "mesh": lambda: ia3rt.patch(on_a_mesh_of_two()),
        "forward": lambda: ia3rt.patch(with_a_forward_of_its_own()),
        "placed": placed_otherwise,
        "after": parallelised_after,
    }
    said = {}
    for what, call in refused.items():
        try:
            call()
        except (ValueError, RuntimeError) as error:
            said[what] = str(error)
    assert (runtime.adapters, len(runtime.sites)) == before
    return said


dist.init_process_group("gloo", timeout=timedelta(seconds=100))
mesh = dist.init_device_mesh("cpu", (2,))
results = {
    "llama by transformers": seen(by_transformers("llama"), "llama"),
    "llama by torch": seen(by_torch("llama"), "llama"),
    "phi3 by transformers": seen(by_transformers("phi3"), "phi3"),
    "late": {"llama": late(by_torch("llama"), "llama"), "phi3": late(by_transformers("phi3"), "phi3")},
    "refusals": refusals(),
}
torch.save(results, FOLDER / f"{dist.get_rank()}.pt")
dist.destroy_process_group()
