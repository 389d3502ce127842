"""Takes the IA³ adapters over that PEFT put into a model, and makes the model what it was without PEFT."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ia3rt.adapters.refusals import allow, refuse
from ia3rt.adapters.site import SiteKey

KEPT_IN_MODEL = ("peft_config", "_hf_peft_config_loaded")
"""What PEFT and transformers keep in a model that has adapters."""

_UNLOADED = "merge_and_unload() makes it part of the weights, and unload() takes it out: patch what they return"
"""What to do about an adapter of another type."""


@dataclass
class TakenOver:
    """What PEFT had put into a model.

    Attributes:
        owner: what it was given as: the PeftModel, or the model itself where its adapters have none.
        model: the base model.
        vectors: by adapter, its vectors by module path and side, as PEFT's layers hold them.
        modules: by adapter, the tensors of its own modules (modules_to_save), by path, then by name.
        configs: by adapter, what its adapter_config.json would hold.
        active: the adapters whose product all layers wear; empty where they wear none.
        layers: PEFT's layers, by each path at which one stands.
        wrappers: PEFT's modules around those that adapters have their own of, by path.
        dtypes: what each of them computed in.
        peft_configs: PEFT's own table of its adapters' configs.
    """

    owner: Any
    model: nn.Module
    vectors: dict[str, dict[SiteKey, Tensor]]
    modules: dict[str, dict[str, dict[str, Tensor]]]
    configs: dict[str, dict[str, Any]]
    active: list[str]
    layers: dict[str, Any]
    wrappers: dict[str, Any]
    dtypes: dict[nn.Module, torch.dtype]
    peft_configs: dict[str, Any]
    _kept: dict[str, Any] = field(default_factory=dict)

    @property
    def is_wrapped(self) -> bool:
        """Whether `owner` is PEFT's wrapper around the model."""
        return self.owner is not self.model

    def unwrap(self) -> None:
        """Puts the model's own modules where PEFT's stand; what is left of PEFT refuses to work."""
        self.layers = dict(ia3_layers(self.model))
        self._kept = {name: vars(self.model)[name] for name in KEPT_IN_MODEL if name in vars(self.model)}
        if self.is_wrapped:
            vars(self.owner.base_model).setdefault("peft_config", self.peft_configs)
        for path, layer in self.layers.items():
            _put(self.model, path, layer.base_layer)
        for path, wrapper in self.wrappers.items():
            _put(self.model, path, wrapper.original_module)
        for name in self._kept:
            del vars(self.model)[name]
        refuse(self.owner)

    def release(self) -> None:
        """Leaves the model without PEFT's layers for good; a PeftModel around it goes on refusing."""
        if not self.is_wrapped:
            allow(self.owner)

    def rewrap(self) -> None:
        """Takes `unwrap` back."""
        allow(self.owner)
        vars(self.model).update(self._kept)
        for path, layer in self.layers.items():
            _put(self.model, path, layer)
        for path, wrapper in self.wrappers.items():
            _put(self.model, path, wrapper)


def base_model(model: Any) -> nn.Module:
    """The model that is patched where `model` is given: the one under a PeftModel, or `model` itself."""
    is_peft_model = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    return model.get_base_model() if is_peft_model else model  # type: ignore[no-any-return]


def take_over(model: Any) -> TakenOver | None:
    """Copies the adapters out of a PeftModel, or of a model that transformers or PEFT put them into without one.

    Changes nothing yet. None where it is neither.

    Raises:
        ValueError: an adapter is not IA³, an adapter is merged, a layer's vector is offloaded,
            or layers differ in which adapters act, so that no mix says it.
    """
    if hasattr(type(model), "inject_adapter"):
        _check_configs(model)
        raise ValueError(
            f"{type(model).__name__} is the part of a PeftModel that holds its layers: pass the PeftModel itself"
        )
    base = base_model(model)
    if base is model and not _has_adapters_of_its_own(model):
        return None
    _check_configs(model)
    layers = dict(ia3_layers(base))
    vectors: dict[str, dict[SiteKey, Tensor]] = {name: {} for name in model.peft_config}
    seen: set[nn.Module] = set()
    for path, layer in layers.items():
        if layer.merged:
            raise ValueError(f"adapters {layer.merged_adapters} are merged at {path!r}: call unmerge_adapter() first")
        if layer not in seen:
            seen.add(layer)
            for name in layer.ia3_l:
                key: SiteKey = path, "in" if layer.is_feedforward else "out"
                vectors.setdefault(name, {})[key] = _vector(path, layer, name)
    configs = {name: _jsonable(config.to_dict()) for name, config in model.peft_config.items()}
    dtypes = {layer: layer.weight.dtype for layer in layers.values()}
    wrappers = dict(own_module_wrappers(base))
    modules: dict[str, dict[str, dict[str, Tensor]]] = {name: {} for name in vectors}
    for path, wrapper in wrappers.items():
        for name, own in wrapper.modules_to_save.items():
            modules[name][path] = {each: tensor.clone() for each, tensor in own.state_dict().items()}
    active = _active(layers)
    _check_own(wrappers, active)
    return TakenOver(model, base, vectors, modules, configs, active, layers, wrappers, dtypes, model.peft_config)


def _has_adapters_of_its_own(model: nn.Module) -> bool:
    """Whether a model has IA³ adapters without a PeftModel, by its `load_adapter` or PEFT's inject_adapter_in_model.

    A model under a PeftModel looks the same, and only that one knows of it.
    """
    if not hasattr(model, "peft_config") or next(ia3_layers(model), None) is None:
        return False
    gc.collect()  # a PeftModel that nobody holds is none
    alive = gc.get_objects()
    tuners = {kind for kind in set(map(type, alive)) if hasattr(kind, "inject_adapter")}
    return not any(type(each) in tuners and vars(each).get("_modules", {}).get("model") is model for each in alive)


def ia3_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's IA³ layers in a model, by each path at which one stands."""
    for path, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "ia3_l") and hasattr(module, "base_layer"):
            yield path, module


def own_module_wrappers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's modules around those that adapters have their own of (modules_to_save), by path."""
    for path, module in model.named_modules():
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            yield path, module


def _check_own(wrappers: dict[str, Any], active: list[str]) -> None:
    """Raises ValueError where a wrapper runs another adapter's module than the layers' vectors are of."""
    for path, wrapper in wrappers.items():
        runs = [] if wrapper.disable_adapters else [n for n in wrapper.active_adapters if n in wrapper.modules_to_save]
        should = [name for name in active if name in wrapper.modules_to_save]
        if runs != should:
            raise ValueError(
                f"PEFT's layers have {active} active, and {path!r} runs the module of {runs or 'no adapter'}: make "
                "them alike first (set_adapter())"
            )


def check_unwrapped(model: nn.Module) -> None:
    """Raises ValueError where PEFT wraps a layer of a model, whose adapters nobody takes over."""
    wrapped = [
        (path, layer)
        for path, layer in model.named_modules()
        if hasattr(layer, "base_layer") and hasattr(layer, "adapter_layer_names")
    ]
    for path, layer in wrapped:
        if not hasattr(layer, "ia3_l"):
            kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
            raise ValueError(
                f"PEFT wraps {path!r} in a {kind}: ia3rt takes over IA3 adapters only. Of a PeftModel {_UNLOADED}; or "
                "load the model without it"
            )
    if wrapped:
        raise ValueError(f"PEFT wraps {wrapped[0][0]!r}: pass the PeftModel itself, or unload its adapters first")


def _check_configs(model: Any) -> None:
    for name, config in model.peft_config.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "IA3":
            what_to_do = _UNLOADED if hasattr(model, "merge_and_unload") else "patch a model without it"
            raise ValueError(f"adapter {name!r} is of type {kind}: ia3rt takes over IA3 adapters only; {what_to_do}")


def _vector(path: str, layer: Any, name: str) -> Tensor:
    vector: Tensor = layer.ia3_l[name].detach()
    if vector.is_meta:
        raise ValueError(
            f"the vector of adapter {name!r} at {path!r} is on the meta device, as accelerate offloads it or it was "
            "never loaded: load the adapter after patch(model), with the Runtime's load_adapter()"
        )
    return vector.clone()


def _active(layers: dict[str, Any]) -> list[str]:
    """The adapters whose product is what each layer computes; one that a layer lacks does not count there."""
    times: dict[str, tuple[int, str]] = {}
    for path, layer in layers.items():
        acting = Counter([] if layer.disable_adapters else layer.active_adapters)
        for name in layer.ia3_l:
            count, where = times.setdefault(name, (acting[name], path))
            if count != acting[name]:
                raise ValueError(
                    f"PEFT's layers differ in which adapters are active: {name!r} acts {_times(count)} at {where!r} "
                    f"and {_times(acting[name])} at {path!r}. In ia3rt a mix is worn by the whole model: make the "
                    "layers alike first (set_adapter(), and enable_adapter_layers() where some are disabled)"
                )
    named = dict.fromkeys(name for layer in layers.values() for name in layer.active_adapters)
    return [name for name in named for _ in range(times.get(name, (0, ""))[0])]


def _times(count: int) -> str:
    return {0: "not", 1: "once"}.get(count, f"{count} times")


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _original(wrapper: Any) -> nn.Module:
    """The base model's own module under one of PEFT's: a layer's, or one of modules_to_save."""
    original: nn.Module = wrapper.original_module if hasattr(wrapper, "modules_to_save") else wrapper.get_base_layer()
    return original


def _jsonable(config: dict[str, Any]) -> dict[str, Any]:
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
