"""Takes the IA³ adapters over from a PEFT model and gives the model under it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ia3rt.adapters.site import Side, SiteKey


@dataclass(frozen=True)
class TakenOver:
    """What a PEFT model held.

    Attributes:
        model: the base model.
        vectors: by adapter, its vectors by module path and side.
        modules: by adapter, the tensors of its own modules (modules_to_save), by path, then by name.
        configs: by adapter, what its adapter_config.json would hold.
        active: the adapters that were active.
        wrappers: PEFT's modules, by path.
    """

    model: nn.Module
    vectors: dict[str, dict[SiteKey, Tensor]]
    modules: dict[str, dict[str, dict[str, Tensor]]]
    configs: dict[str, dict[str, Any]]
    active: list[str]
    wrappers: dict[str, nn.Module]

    def unwrap(self) -> None:
        """Puts the base model's own modules where PEFT's stand."""
        for path, wrapper in self.wrappers.items():
            _put(self.model, path, _original(wrapper))

    def rewrap(self) -> None:
        """Takes `unwrap` back."""
        for path, wrapper in self.wrappers.items():
            _put(self.model, path, wrapper)


def is_peft_model(model: nn.Module) -> bool:
    """Whether `model` is PEFT's wrapper of a model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def read_peft_model(peft_model: Any) -> TakenOver:
    """Copies the adapters out of a PeftModel; changes nothing yet.

    Raises:
        ValueError: an adapter is not IA³, an adapter is merged, or a layer is no linear one.
    """
    for name, config in peft_model.peft_config.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "IA3":
            raise ValueError(f"adapter {name!r} of the PeftModel is of type {kind}: ia3rt takes over IA3 adapters only")
    base = peft_model.get_base_model()
    vectors: dict[str, dict[SiteKey, Tensor]] = {name: {} for name in peft_model.peft_config}
    wrappers: dict[str, Any] = {path: layer for path, layer in base.named_modules() if hasattr(layer, "ia3_l")}
    for path, layer in wrappers.items():
        if layer.merged:
            raise ValueError(f"adapters {layer.merged_adapters} are merged at {path!r}: call unmerge_adapter() first")
        side: Side = "in" if layer.is_feedforward else "out"
        for name, vector in layer.ia3_l.items():
            vectors[name][path, side] = vector.detach().clone()
    modules: dict[str, dict[str, dict[str, Tensor]]] = {name: {} for name in peft_model.peft_config}
    for path, wrapper in base.named_modules():
        if hasattr(wrapper, "modules_to_save") and hasattr(wrapper, "original_module"):
            wrappers[path] = wrapper
            for name, own in wrapper.modules_to_save.items():
                modules[name][path] = {each: tensor.clone() for each, tensor in own.state_dict().items()}
    configs = {name: _jsonable(config.to_dict()) for name, config in peft_model.peft_config.items()}
    disabled = any(layer.disable_adapters for layer in wrappers.values())
    active = [] if disabled else list(peft_model.active_adapters)
    return TakenOver(base, vectors, modules, configs, active, wrappers)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _original(wrapper: Any) -> nn.Module:
    """The base model's own module under one of PEFT's: a layer's, or one of modules_to_save."""
    original: nn.Module = wrapper.original_module if hasattr(wrapper, "modules_to_save") else wrapper.get_base_layer()
    return original


def _jsonable(config: dict[str, Any]) -> dict[str, Any]:
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
