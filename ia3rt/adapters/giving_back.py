"""Gives PEFT's layers back what was taken over from them, as it is now."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from ia3rt.adapters.contents import AdapterContents
from ia3rt.adapters.mix import Mix
from ia3rt.adapters.site import Side
from ia3rt.adapters.site_names import config_names
from ia3rt.adapters.takeover import KEPT_IN_MODEL, TakenOver, ia3_layers


def active_in_peft(worn: Sequence[Mix]) -> list[str]:
    """The adapters that PEFT's layers are to have active, where rows wear these mixes.

    Raises:
        ValueError: they cannot, as they multiply all rows by the same adapters.
    """
    if len(worn) > 1 or worn[0].weights is not None:
        raise ValueError(
            f"rows wear {', '.join(map(str, worn))}, which PEFT's layers cannot have active: set_adapter() a product "
            "or None before unpatch(), or make an adapter of it by add_weighted_adapter()"
        )
    return list(worn[0].adapters)


def check_givable(taken: TakenOver, adapters: Sequence[AdapterContents]) -> None:
    """Raises ValueError where PEFT's layers cannot hold an adapter: their vectors are attributes, all at one side."""
    sides: dict[str, Side] = {path: _side(layer) for path, layer in taken.layers.items()}
    for adapter in adapters:
        held = {path for path, wrapper in taken.wrappers.items() if adapter.name in wrapper.modules_to_save}
        if adapter.modules and held != set(adapter.modules):
            raise ValueError(
                f"adapter {adapter.name!r} has its own {sorted(adapter.modules)}, of which the PeftModel that was "
                f"patched has {sorted(held) or 'none'} of it: save_adapter() and delete_adapter() it before unpatch()"
            )
        if "." in adapter.name or hasattr(nn.ParameterDict, adapter.name):
            raise ValueError(
                f"PEFT's layers cannot hold an adapter named {adapter.name!r}, as names of parameters have no dots and "
                "hide nothing: before unpatch(), add_adapter() what get_adapter() gives by another name and delete it"
            )
        modules = dict(taken.model.named_modules())
        for path, side in adapter.vectors:
            if path not in modules:
                raise ValueError(
                    f"adapter {adapter.name!r} acts at {path!r}, experts that are one tensor, where PEFT has no IA³: "
                    "save_adapter() and delete_adapter() it before unpatch()"
                )
            module = modules[path]
            wrapped = isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) or hasattr(module, "nf")
            if path not in taken.layers and not wrapped:
                raise ValueError(
                    f"adapter {adapter.name!r} acts at {path!r}, a kind of layer that PEFT does not wrap: "
                    "save_adapter() and delete_adapter() it before unpatch()"
                )
            if sides.setdefault(path, side) != side:
                raise ValueError(
                    f"adapter {adapter.name!r} has a vector for the {side}put of {path!r}, where PEFT's layer has one "
                    f"for the {sides[path]}put and no room for two: save_adapter() and delete_adapter() it before "
                    "unpatch()"
                )


def give_back(taken: TakenOver, adapters: Sequence[AdapterContents], active: Sequence[str]) -> None:
    """Puts PEFT's layers back into the model, with adapters as they are now.

    Layers that it had keep their parameters and their requires_grad; only numbers that have changed are written.

    Args:
        taken: what was taken over.
        adapters: all there are now: `check_givable`.
        active: those whose product all rows wear.

    Raises:
        Exception: PEFT does not wrap a layer that an adapter acts at. The model is as it was before the call then.
    """
    layers, configs = taken.layers, dict(taken.peft_configs)
    held = {layer: dict(layer.ia3_l.items()) for layer in layers.values()}
    taken.rewrap()
    try:
        _fill(taken, adapters, active)
    except BaseException:
        taken.unwrap()
        taken.layers = layers
        for layer, vectors in held.items():
            layer.ia3_l = nn.ParameterDict(vectors)
        taken.peft_configs.clear()
        taken.peft_configs.update(configs)
        raise


def _fill(taken: TakenOver, adapters: Sequence[AdapterContents], active: Sequence[str]) -> None:
    now = {adapter.name: adapter for adapter in adapters}
    trained = {parameter: parameter.requires_grad for parameter in taken.model.parameters()}
    states = {layer: (list(layer.active_adapters), layer.disable_adapters) for layer in taken.layers.values()}
    for name, vectors in taken.vectors.items():
        if name not in now or now[name].vectors.keys() != vectors.keys():
            _remove(taken, name)
    names = [name for name, _ in taken.model.named_modules()]
    for adapter in adapters:
        if adapter.name not in taken.peft_configs:
            _inject(taken, adapter, names)
    for path, wrapper in taken.wrappers.items():
        for name in [name for name in wrapper.modules_to_save if name not in now]:
            del wrapper.modules_to_save[name]
        for name, own in wrapper.modules_to_save.items():
            with torch.no_grad():
                for each, tensor in own.state_dict().items():
                    tensor.copy_(now[name].modules[path][each])
    layers: dict[Any, str] = {}
    for path, layer in ia3_layers(taken.model):
        layers.setdefault(layer, path)
    for layer, path in layers.items():
        _move(layer, taken.dtypes.get(layer))
        for adapter in adapters:
            if adapter.name in layer.ia3_l:
                key = path, _side(layer)
                given = taken.vectors.get(adapter.name, {}).get(key)
                _write(layer.ia3_l[adapter.name], adapter.vectors[key], given)
    _activate(taken, layers, states, active)
    unchanged = list(active) == taken.active
    for name, parameter in taken.model.named_parameters():
        if unchanged or not _is_an_adapters(name):  # else as PEFT's set_adapter makes those of the active ones
            parameter.requires_grad_(trained.get(parameter, False))


def _is_an_adapters(name: str) -> bool:
    return ".ia3_l." in name or ".modules_to_save." in name


def _remove(taken: TakenOver, name: str) -> None:
    taken.peft_configs.pop(name, None)
    for layer in set(taken.layers.values()):
        if name in layer.ia3_l:
            del layer.ia3_l[name]


def _inject(taken: TakenOver, adapter: AdapterContents, module_names: Collection[str]) -> None:
    """Lets PEFT make the layers of an adapter that it does not have."""
    from peft import IA3Config, inject_adapter_in_model

    sides: dict[str, Side] = dict(adapter.vectors.keys())
    target, feedforward = config_names(sides, module_names)
    known = {field.name for field in fields(IA3Config)}
    config = IA3Config(
        **{
            **{key: value for key, value in adapter.config.items() if key in known},
            "target_modules": target,
            "feedforward_modules": feedforward,
            "exclude_modules": None,
            "inference_mode": True,
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the model has adapters already
        inject_adapter_in_model(config, taken.model, adapter.name)
    taken.peft_configs[adapter.name] = config


def _side(layer: Any) -> Side:
    return "in" if layer.is_feedforward else "out"


def _move(layer: Any, dtype: torch.dtype | None) -> None:
    """Lets a layer's vectors follow what happened to the model meanwhile: they were no part of it."""
    weight = layer.weight
    for vector in layer.ia3_l.values():
        if not weight.is_meta:
            vector.data = vector.data.to(weight.device)
        if dtype is not None and weight.dtype != dtype and weight.dtype.is_floating_point:
            vector.data = vector.data.to(weight.dtype)


def _write(parameter: nn.Parameter, vector: Tensor, given: Tensor | None) -> None:
    flat = vector.cpu()
    if given is not None and torch.equal(given.reshape(-1).cpu().to(flat.dtype), flat):
        return  # the numbers that it has, before the bank rounded them
    dtype = vector.dtype if given is None else parameter.dtype
    parameter.data = vector.reshape(parameter.shape).to(parameter.device, dtype)


def _activate(
    taken: TakenOver, layers: Iterable[Any], states: Mapping[Any, tuple[list[str], bool]], active: Sequence[str]
) -> None:
    """Makes all layers wear the product of `active`; each as it was where that is what they wore."""
    unchanged = list(active) == taken.active
    for layer in layers:
        worn, disabled = states.get(layer, (list(active), False)) if unchanged else (list(active), False)
        layer.enable_adapters(True)
        layer.set_adapter([name for name in worn if name in taken.peft_configs])
        if disabled:
            layer.enable_adapters(False)
    if not taken.is_wrapped:
        if not taken.peft_configs:  # as transformers does when it deletes the last one
            for name in KEPT_IN_MODEL:
                vars(taken.model).pop(name, None)
        return
    for own in taken.wrappers.values():
        if not unchanged:
            own.set_adapter([name for name in active if name in own.modules_to_save][:1])
    wrapper = taken.owner
    if not unchanged:
        wrapper.base_model.active_adapter = active[0] if len(active) == 1 else list(active)
    if taken.peft_configs and (active or wrapper.active_adapter not in taken.peft_configs):
        wrapper.active_adapter = [*active, *taken.peft_configs][0]
