"""What PEFT's own objects say while ia3rt holds their adapters: they would do nothing, or tell what was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

from ia3rt.adapters.set_on import set_on, take_off

_INSTEAD = {
    "active_adapter": "active_adapters",
    "active_adapters": "active_adapters",
    "add_adapter": "add_adapter(name)",
    "add_weighted_adapter": "add_weighted_adapter(…)",
    "delete_adapter": "delete_adapter(name)",
    "disable_adapter": "disable_adapter()",
    "disable_adapter_layers": "set_adapter(None)",
    "disable_adapters": "set_adapter(None)",
    "enable_adapter_layers": "set_adapter(name)",
    "enable_adapters": "set_adapter(name)",
    "enable_peft_hotswap": "load_adapter(path, name)",
    "get_adapter_state_dict": "get_adapter(name)",
    "get_layer_status": "sites",
    "get_model_status": "adapters",
    "inject_adapter": "add_adapter(name)",
    "load_adapter": "load_adapter(path, name)",
    "load_state_dict": "load_adapter(path, name)",
    "merge_adapter": "merge_adapter()",
    "merge_and_unload": "merge_and_unload()",
    "push_to_hub": "save_adapter(name, path)",
    "save_pretrained": "save_adapter(name, path)",
    "set_adapter": "set_adapter(name)",
    "set_requires_grad": "train_adapter(name)",
    "state_dict": "get_adapter(name)",
    "unload": "unpatch()",
    "unmerge_adapter": "unmerge_adapter()",
}
"""What PEFT and transformers offer for adapters, and what the Runtime has for it."""

_OF_A_PLAIN_MODEL = {"state_dict", "load_state_dict"}
"""What a transformers model does for its own weights, adapters or not."""


def refuse(owner: Any) -> None:
    """Makes each use of a PeftModel's adapters an error; `forward` and `generate` go on.

    Also of a transformers model that had loaded adapters itself: it keeps its class, which its config and its files
    name. PEFT's objects get another one, as drop-ins do: part of what they offer are properties.
    """
    if not _is_peft(owner):
        names = [name for name in _INSTEAD.keys() - _OF_A_PLAIN_MODEL if hasattr(owner, name)]
        kind = type(owner).__name__
        set_on(owner, "ia3_hidden", {name: functools.partial(_fail, f"{kind}.{name}", name) for name in names})
        return
    for each in (owner, owner.base_model):
        set_on(each, "ia3_hidden", {}, _INSTEAD.keys() - {"active_adapter"})
        each.__class__ = _refusing(type(each))


def allow(owner: Any) -> None:
    """Takes `refuse` back."""
    for each in (owner, owner.base_model) if _is_peft(owner) else (owner,):
        if "ia3_refuses" in vars(type(each)):
            each.__class__ = type(each).__bases__[0]
        take_off(each, "ia3_hidden")


def _is_peft(owner: Any) -> bool:
    return hasattr(owner, "get_base_model")


def _refusing(cls: type) -> type:
    copied = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    namespace: dict[str, Any] = {**copied, "ia3_refuses": True}
    for name in _INSTEAD:
        if name == "active_adapter" or isinstance(getattr(cls, name, None), property):
            fail = functools.partial(_fail, f"{cls.__name__}.{name}", name)
            namespace[name] = property(fail, fail)
        elif hasattr(cls, name):
            namespace[name] = _method(cls, name)
    if hasattr(cls, "active_peft_config"):
        # What forward and generate ask for, to know what kind of adapters these are: they are all of one.
        namespace["active_peft_config"] = property(lambda self: next(iter(self.peft_config.values())))
        namespace["_enable_peft_forward_hooks"] = _forward_hooks
    return type(cls.__name__, (cls,), namespace)


def _method(cls: type, name: str) -> Callable[..., NoReturn]:
    def refused(self: object, *args: object, **kwargs: object) -> NoReturn:
        _fail(f"{cls.__name__}.{name}", name)

    return refused


def _forward_hooks(self: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("adapter_names") is not None:
        raise RuntimeError(
            "adapter_names of a PeftModel are out of use, as ia3rt.patch() took its adapters over: use "
            "`with rt.route([…]):`, rt being what patch() returned"
        )
    return type(self).__bases__[0]._enable_peft_forward_hooks(self, *args, **kwargs)  # type: ignore[attr-defined]


def _fail(what: str, name: str, *args: object, **kwargs: object) -> NoReturn:
    raise RuntimeError(
        f"{what} is out of use, as ia3rt.patch() took the adapters over: use rt.{_INSTEAD[name]}, rt being the Runtime "
        "that patch() returned, or rt.unpatch() first, which gives the adapters back"
    )
