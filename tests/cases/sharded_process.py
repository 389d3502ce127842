"""One of two processes that share a model by FSDP; prints what a test compares."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from mixtures import tiny_mixture
from tiny import logits, tiny_model, token_ids
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import ia3rt

ROWS = ["a", None, ["b", "a"], "b"]


def patched(model: nn.Module) -> ia3rt.Runtime:
    runtime = ia3rt.patch(model)
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        sites = {site.key: site.width for site in runtime.sites}
        runtime.add_adapter(
            name, {key: torch.empty(width).uniform_(0.5, 1.5, generator=generator) for key, width in sites.items()}
        )
    return runtime


def shard(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def worn(runtime: ia3rt.Runtime, whole: ia3rt.Runtime) -> float:
    """How much logits differ from the single model's, at most."""
    ids, largest = token_ids(4), 0.0
    for spec in ("a", ["a", "b"], {"a": 0.3, "b": 0.5}, None):
        for each in (runtime, whole):
            each.set_adapter(spec)
        largest = max(largest, float((logits(runtime.model, ids) - logits(whole.model, ids)).abs().max()))
    with runtime.route(ROWS), whole.route(ROWS):
        for _ in range(2):
            largest = max(largest, float((logits(runtime.model, ids) - logits(whole.model, ids)).abs().max()))
    return largest


def trained(runtime: ia3rt.Runtime, whole: ia3rt.Runtime) -> float:
    """How much gradients of one half of the rows in each process differ from those of all rows, relatively, at most."""
    ids, rank = token_ids(4), dist.get_rank()
    half = slice(2 * rank, 2 * rank + 2)
    for each, rows, mine in ((runtime, ROWS[half], ids[half]), (whole, ROWS, ids)):
        each.train_adapter(["a", "b"])
        for _ in range(2):  # the second adds to the first
            with each.route(rows):
                each.model(mine, labels=mine).loss.backward()
    expected = {name: each.grad for name, each in whole.model.named_parameters() if "ia3_" in name}
    got = dict(runtime.model.named_parameters())
    return max(float((got[name].grad - grad).norm() / grad.norm()) for name, grad in expected.items())


def trained_in_fsdp1() -> tuple[float, str]:
    """How much logits differ from the single model's after two steps, at most, and what is said of a split vector."""
    ids, rank = token_ids(4), dist.get_rank()
    runtime, whole = patched(tiny_model()), patched(tiny_model())
    for each in (runtime, whole):
        each.train_adapter("a")
    wrapped = FullyShardedDataParallel(runtime.model, use_orig_params=True, device_id=torch.device("cpu"))
    for model, mine in ((wrapped, ids[2 * rank : 2 * rank + 2]), (whole.model, ids)):
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
        for _ in range(2):
            model(mine, labels=mine).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    try:
        said = str(runtime.get_adapter("a"))
    except RuntimeError as error:
        said = str(error)
    during = logits(whole.model, ids)
    with torch.no_grad():
        differs = float((wrapped(ids).logits - during).abs().max())
    with FullyShardedDataParallel.summon_full_params(wrapped):
        runtime.end_training()
    with torch.no_grad():
        return max(differs, float((wrapped(ids).logits - during).abs().max())), said


def refusals() -> list[str]:
    """What is said of what is not supported."""
    said = []
    mesh = dist.init_device_mesh("cpu", (2,))
    mixture = tiny_mixture(num_hidden_layers=1)
    experts = mixture.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(distribute_tensor(experts.down_proj.detach(), mesh, [Shard(0)]))
    runtime = patched(tiny_model())
    runtime.train_adapter("a")
    shard(runtime.model)
    sharded = patched(shard(tiny_model()))
    sharded.set_adapter("a")
    own = {"lm_head": tiny_model().lm_head.state_dict()}
    headed = patched(tiny_model())
    headed.add_adapter("headed", modules=own)
    shard(headed.model)
    refused_all = (
        lambda: runtime.model(token_ids()),
        sharded.merge_adapter,
        lambda: headed.train_adapter("headed"),
        lambda: sharded.add_adapter("headed", modules=own),
        lambda: ia3rt.patch(mixture, target_modules=["experts.down_proj"]),
    )
    for refused in refused_all:
        try:
            refused()
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
    return said


dist.init_process_group("gloo")
results = {}
for made in (tiny_model, tiny_mixture):
    for order in ("sharded first", "patched first"):
        whole = patched(made())
        if order == "sharded first":
            runtime = patched(shard(made()))
        else:
            runtime = patched(made())
            shard(runtime.model)
        results[f"{made.__name__}, {order}"] = worn(runtime, whole), trained(runtime, whole)
results["fsdp1"] = trained_in_fsdp1()
results["refusals"] = refusals()
if dist.get_rank() == 0:
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(results, file)
dist.destroy_process_group()
