"""patch(model): the one call that gives a model its Runtime."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import get_args

import torch
from torch import Tensor, nn

from ia3rt import ops
from ia3rt.adapters.bank import Bank
from ia3rt.adapters.site import ModuleNames, Site
from ia3rt.adapters.takeover import TakenOver, is_peft_model, read_peft_model
from ia3rt.modules import attention
from ia3rt.modules.sites import find_sites
from ia3rt.modules.wearer import Wearer, computing_tensor
from ia3rt.routing.route import Backend
from ia3rt.runtime import Runtime


def patch(
    model: nn.Module,
    *,
    target_modules: ModuleNames | None = None,
    feedforward_modules: ModuleNames | None = None,
    exclude_modules: ModuleNames | None = None,
    dtype: torch.dtype = torch.float32,
    capacity: int = 8,
    backend: Backend | None = None,
    fuse_gate_up: bool = False,
) -> Runtime:
    """Lets a model wear IA³ adapters. The model is used as before, and computes the same until an adapter is set.

    Args:
        model: a Hugging Face model or any module tree; or a PeftModel whose adapters are all IA³, which are taken over
            with those that were active (the base model under it is then the patched one).
        target_modules: modules that can wear a vector, as in PEFT's IA3Config: a list or set of names, a regular
            expression, or "all-linear". None finds the key and value projections and the second MLP matrix by
            structure, and lets an adapter that acts elsewhere add its sites when it is loaded.
        feedforward_modules: which of them wear it at the input.
        exclude_modules: modules that are left as they are.
        dtype: of the resident vectors: float32, or bfloat16 / float16 to halve their memory.
        capacity: how many adapters to make room for at first. The bank grows when they are more.
        backend: `triton` or `torch`. None takes Triton on a CUDA device and torch elsewhere.
        fuse_gate_up: whether one kernel computes the first half of an MLP, both its matrices and its activation, where
            it can read them: on the Triton backend, as long as they wear no vector and have no hook. It is as
            accurate. Not the default, as it is not measured on a GPU yet.

    Returns:
        The model's Runtime.

    Raises:
        ValueError: the model is patched already, no site is found, its sites lie on several devices, PEFT still wraps
            its layers, or the PeftModel holds adapters of another type. The model is as it was then.
    """
    taken = read_peft_model(model) if is_peft_model(model) else None
    base = taken.model if taken else getattr(model, "_orig_mod", model)  # _orig_mod: under torch.compile's wrapper
    if taken:
        taken.unwrap()
    try:
        runtime = _patch_plain(
            base, target_modules, feedforward_modules, exclude_modules, dtype, capacity, backend, fuse_gate_up
        )
        if taken:
            _adopt(runtime, taken)
    except Exception:
        if taken:
            taken.rewrap()
        raise
    return runtime


def _patch_plain(
    model: nn.Module,
    target_modules: ModuleNames | None,
    feedforward_modules: ModuleNames | None,
    exclude_modules: ModuleNames | None,
    dtype: torch.dtype,
    capacity: int,
    backend: Backend | None,
    fuse_gate_up: bool,
) -> Runtime:
    for path, layer in model.named_modules():
        if isinstance(layer, Wearer):
            raise ValueError("the model is patched already: use the Runtime of the first patch(), or unpatch() it")
        if hasattr(layer, "base_layer") and hasattr(layer, "adapter_layer_names"):
            raise ValueError(f"PEFT wraps {path!r}: pass the PeftModel itself, or unload its adapters first")
    if "transformers" in sys.modules:
        with suppress(ImportError):  # an early one, without a registry
            attention.register()  # model.set_attn_implementation("ia3rt") works from now on
    sites = find_sites(model, target_modules, feedforward_modules, exclude_modules)
    weight = _first_weight(model, sites)
    chosen = _backend(backend, weight)
    bank = Bank(sites, weight.device, dtype, capacity)
    extends = target_modules is None
    return Runtime(model, bank, chosen, exclude_modules or (), extends=extends, fuses_gate_up=fuse_gate_up)


def _adopt(runtime: Runtime, taken: TakenOver) -> None:
    try:
        for name, vectors in taken.vectors.items():
            runtime.add_adapter(name, vectors, taken.configs[name], taken.modules[name])
        if taken.active:
            runtime.set_adapter(taken.active)
    except ValueError:
        runtime.unpatch()
        raise


def _first_weight(model: nn.Module, sites: list[Site]) -> Tensor:
    weights = [computing_tensor(model.get_submodule(site.path)) for site in sites]
    devices = sorted({str(weight.device) for weight in weights})
    if len(devices) > 1:
        raise ValueError(f"the model's sites lie on several devices {devices}: ia3rt needs them on one")
    if weights[0].is_meta:
        raise ValueError("the model has no weights yet (they are on the meta device): load them before patch()")
    return weights[0]


def _backend(backend: Backend | None, weight: Tensor) -> Backend:
    if backend is None:
        return ops.backend(weight) if weight.is_cuda else "torch"
    if backend not in get_args(Backend):
        raise ValueError(f"unknown backend {backend!r}: use 'triton', 'torch' or None")
    if backend == "triton" and ops.backend(weight) != "triton":
        raise ValueError(
            f"the triton backend does not run {weight.dtype} on {weight.device}: it needs a CUDA device, the triton "
            "package, and float32, bfloat16 or float16"
        )
    return backend
