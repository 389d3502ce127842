"""patch(model): the one call that gives a model its Runtime."""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from operator import index
from typing import get_args

import torch
from torch import Tensor, nn

from ia3rt import ops
from ia3rt.adapters.bank import Bank
from ia3rt.adapters.given import check_model
from ia3rt.adapters.site import ModuleNames, Side, Site, SlicedNames
from ia3rt.adapters.site_tables import check_dtype
from ia3rt.adapters.sizes import bytes_of
from ia3rt.adapters.takeover import TakenOver, base_model, check_unwrapped, take_over
from ia3rt.modules import attention
from ia3rt.modules.sharding import is_tensor_parallel
from ia3rt.modules.sites import Targets, find_sites, site_of
from ia3rt.modules.wearer import Wearer, computing_device, computing_tensor
from ia3rt.routing.route import Backend
from ia3rt.runtime import Runtime


def patch(
    model: nn.Module,
    *,
    target_modules: ModuleNames | SlicedNames | None = None,
    feedforward_modules: ModuleNames | None = None,
    exclude_modules: ModuleNames | None = None,
    dtype: torch.dtype = torch.float32,
    capacity: int | str = 8,
    grow: bool = True,
    host_memory: int | str = "256MB",
    backend: Backend | None = None,
    fuse_gate_up: bool = False,
) -> Runtime:
    """Lets a model wear IA³ adapters. The model is used as before, and computes the same until an adapter is set.

    Args:
        model: a Hugging Face model or any module tree, on one device or several. IA³ adapters of a PeftModel, or that
            transformers' `load_adapter` or PEFT's `inject_adapter_in_model` put into the model, are taken over with
            those that its layers have active, and given back by `unpatch`. Meanwhile the model under a PeftModel is the
            patched one, and what PEFT and transformers offer for adapters is an error that says what to call instead.
            Or a deep copy of a patched model: its Runtime was copied with it, and is returned.
        target_modules: modules that can wear a vector, as in PEFT's IA3Config: a list or set of names, a regular
            expression, or "all-linear". None finds the key and value projections and the second MLP matrix by
            structure, or nothing, and lets an adapter that acts elsewhere add its sites when it is loaded. Of a model
            with PEFT's adapters, None finds the sites of these. A mapping of such names says of a fused projection
            which slices of its output wear the vector, as {"c_attn": ("k", "v"), "mlp.c_proj": None}: some of "q", "k"
            and "v", or of "gate", which is activated, and "up"; None for all of it. Vectors keep their full width, with
            ones elsewhere, and adapters with other numbers there are refused. Where the slices are is seen, layer by
            layer, by running the module around the projection on a few tokens (modules/slices.py).
        feedforward_modules: which of them wear it at the input; None leaves that to the structure and to adapters.
        exclude_modules: modules that are left as they are.
        dtype: of the resident vectors: float32, or bfloat16 / float16 to halve their memory.
        capacity: how many adapters to make room for, or how much memory for all of them: "64MB", "1GiB".
        grow: whether the bank grows when they are more, or act at other sites. False keeps it as large as it is, where
            it is: adapters that were registered (`Runtime.register`) make room for others, the least recently used
            first, unless a forward or a route wears them.
        host_memory: how much of the host's memory, in bytes or as text, registered adapters may take that are in the
            bank no more or not yet; pinned memory where the model is on CUDA. What is being read takes memory besides,
            until it is in the bank.
        backend: `triton` or `torch`. None takes Triton where all sites are on CUDA devices, and torch elsewhere and for
            a model that tensor parallelism splits.
        fuse_gate_up: whether one kernel computes the first half of an MLP, both its matrices and its activation, where
            it can read them: on the Triton backend, as long as they wear no vector and have no hook. It is as
            accurate. Not the default: on an H100 it takes as long, or up to 3 % longer.

    Returns:
        The model's Runtime.

    Raises:
        ValueError: the model is patched already, nothing matches `target_modules`, its sites are
            tensor-parallel in a way that is not known, or on the Triton backend; PEFT still wraps its layers, or
            holds adapters of another type, or its layers differ in which adapters are active; or it cannot be seen
            where slices are. After this or any other exception the model is as it was.
        TypeError: it is no model.
    """
    check_model(model, "patch")
    check_dtype(dtype)
    inner = getattr(model, "_orig_mod", model)  # under torch.compile's wrapper
    base = base_model(inner)
    copied: Runtime | None = vars(base).get("ia3_runtime")
    if copied is not None and copied.is_unclaimed:
        given = target_modules, feedforward_modules, exclude_modules, dtype, capacity, grow, host_memory, backend
        if (*given, fuse_gate_up) != (None, None, None, torch.float32, 8, True, "256MB", None, False):
            raise ValueError(
                "the model is a copy of a patched one, and is patched as that is: ia3rt.patch(model) without further "
                "arguments gives its Runtime, and unpatch() of that the model, to be patched otherwise"
            )
        copied.is_unclaimed = False
        return copied
    _check_unpatched(base)
    targets = Targets(target_modules, feedforward_modules, exclude_modules)
    taken = take_over(inner)
    try:
        if taken is not None:
            taken.unwrap()
        check_unwrapped(base)
        if "transformers" in sys.modules:
            with suppress(ImportError):  # an early one, without a registry
                attention.register()  # model.set_attn_implementation("ia3rt") works from now on
        sites = _sites_of(base, taken) if taken is not None and targets == Targets() else []
        sites = sites or find_sites(base, *targets)
        weights = _weights(base, sites)
        rows = _rows(capacity, sum(site.width for site in sites) * dtype.itemsize)
        bank = Bank(sites, partial(_device_of, base), dtype, rows, grow)
        host_bytes = bytes_of(host_memory, "host_memory")
        if backend is None and _is_tensor_parallel(base, sites):
            backend = "torch"  # the kernels compute with whole weights
        return Runtime(base, bank, _backend(backend, weights), targets, fuse_gate_up, taken, host_bytes)
    except BaseException:
        if taken is not None:
            taken.rewrap()
        raise


def _rows(capacity: int | str, row_bytes: int) -> int:
    """How many adapters a capacity means, beside the identity."""
    if not isinstance(capacity, str):
        try:
            return index(capacity)
        except TypeError:
            raise ValueError(
                f'capacity is {capacity!r}: give a number of adapters, or text such as "64MB" or "1.5GiB"'
            ) from None
    given = bytes_of(capacity, "capacity")
    if not row_bytes:
        raise ValueError(f"capacity={capacity!r} means no number of adapters: the model has no site yet, so give one")
    rows = given // row_bytes - 1
    if rows < 1:
        raise ValueError(
            f"capacity={capacity!r} has no room for an adapter: one takes {row_bytes:,} bytes, and so does the base "
            "model's row of ones"
        )
    return rows


def _sites_of(model: nn.Module, taken: TakenOver) -> list[Site]:
    """Where the adapters act that are taken over, in the order of the model's modules.

    One that cannot act where it says is refused by its name when it is added.
    """
    modules = dict(model.named_modules())
    keys = {key for vectors in taken.vectors.values() for key in vectors}
    sites = []
    for path in modules:
        for side in get_args(Side):
            if (path, side) in keys:
                with suppress(ValueError):
                    sites.append(site_of(modules, path, side))
    return sites


def _check_unpatched(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Wearer) or "ia3_runtime" in vars(module):
            raise ValueError("the model is patched already: use the Runtime of the first patch(), or unpatch() it")


def _device_of(model: nn.Module, site: Site) -> torch.device:
    return computing_device(model.get_submodule(site.module))


def _weights(model: nn.Module, sites: list[Site]) -> list[Tensor]:
    """What says where and in what the model computes: a weight on each device of its sites, or its first where it has
    none.

    Empty and on the device where accelerate brings it to, where that offloads it.
    """
    modules = [model.get_submodule(site.module) for site in sites] or [
        module for module in model.modules() if [*module.parameters(False)]
    ]
    weights: dict[torch.device, Tensor] = {}
    for module in modules if sites else modules[:1]:
        device = computing_device(module)
        if device.type == "meta":
            raise ValueError(
                "the model has no weights yet (they are on the meta device, and no hook of accelerate's brings them "
                "elsewhere): load them before patch()"
            )
        if device not in weights:
            weight = computing_tensor(module)
            weights[device] = torch.empty(0, dtype=weight.dtype, device=device) if weight.is_meta else weight
    return list(weights.values()) or [torch.empty(0, dtype=torch.float32, device="cpu")]


def _is_tensor_parallel(model: nn.Module, sites: list[Site]) -> bool:
    modules = dict(model.named_modules())
    return any(is_tensor_parallel(modules, site.module) for site in sites)


def _backend(backend: Backend | None, weights: list[Tensor]) -> Backend:
    if backend is None:
        return "triton" if all(each.is_cuda and ops.backend(each) == "triton" for each in weights) else "torch"
    if backend not in get_args(Backend):
        raise ValueError(f"unknown backend {backend!r}: use 'triton', 'torch' or None")
    for weight in weights if backend == "triton" else ():
        if ops.backend(weight) != "triton":
            raise ValueError(
                f"the triton backend does not run {weight.dtype} on {weight.device}: it needs a CUDA device, the "
                "triton package, and float32, bfloat16 or float16"
            )
    return backend
