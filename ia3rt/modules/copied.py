"""Makes an adapter's own module: the model's, with the tensors that the adapter brings in the place of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ia3rt.modules.offloading import HUNG_ON
from ia3rt.modules.set_forward import keeps_class_forward
from ia3rt.modules.swapping import Swapping, lift
from ia3rt.modules.wearer import PLAIN, Wearer, unwrap


def copied(model: nn.Module, name: str, path: str, state: Mapping[str, Tensor], resizes: bool) -> nn.Module:
    """An adapter's own module, frozen, on the device and in the dtype of the model's.

    Args:
        model: the model.
        name: the adapter's, for errors.
        path: the module's.
        state: its tensors, by their names in it: all that its state_dict() has.
        resizes: whether it may have another number of rows than the model's, as saved embeddings may.

    Raises:
        ValueError: the model has no such module, or the tensors are not those of one like it.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if path not in modules or not path:
        raise ValueError(
            f"adapter {name!r} has its own module {path!r} ({_listed(state)}), which {type(model).__name__} lacks: it "
            "was trained on a model with another head; load it into one of that class"
        )
    module = modules[path]
    for name_in_it, part in module.named_modules():
        if not keeps_class_forward(part):
            where = f"module {path!r}" if part is module else f"{name_in_it!r} in module {path!r}"
            raise ValueError(f"{where} has a forward of its own, set by other code, which would hide an adapter's")
    _check(name, path, own_state(module), state, resizes)
    made: nn.Module = copy.deepcopy(module, _kept(module))
    for part in made.modules():
        for trained in [each for each in part._parameters if each.startswith("ia3_")]:
            del part._parameters[trained]
        for hung in HUNG_ON:  # what the model's module gets is brought to its device, and the adapter's own is there
            vars(part).pop(hung, None)
        if isinstance(part, Swapping):
            lift(part)
        if isinstance(part, Wearer):
            unwrap(part)
    for tensor_name, tensor in state.items():
        _put(made, tensor_name, tensor, resizes)
    _tie(module, made, state)
    return made.requires_grad_(False)


def sharing(model: nn.Module, path: str) -> list[str]:
    """The other modules that share the weight of the module at `path`: embeddings that are tied."""
    own = model.get_submodule(path)
    weight = own._parameters.get("weight")
    return [
        other
        for other, module in model.named_modules()
        if module is not own and weight is not None and module._parameters.get("weight") is weight
    ]


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """What a module's state_dict() has, but for the vectors in training that stand in it."""
    state = module.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.rpartition(".")[2].startswith("ia3_")}


def _check(name: str, path: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor], resizes: bool) -> None:
    where = f"adapter {name!r}'s own module {path!r}"
    if not own:
        raise ValueError(f"{where} would be the model's: there is no tensor in that, so leave it out")
    if missing := sorted(own.keys() - state.keys()):
        raise ValueError(f"{where} lacks {missing}: the model's has {sorted(own)}, the adapter brings {sorted(state)}")
    if unknown := sorted(state.keys() - own.keys()):
        raise ValueError(f"{where} holds {unknown}, which the model's has not: that has {sorted(own)}")
    for tensor_name, tensor in state.items():
        theirs, ours = tuple(tensor.shape), tuple(own[tensor_name].shape)
        if type(own[tensor_name]) not in (Tensor, nn.Parameter) or _is_packed(own[tensor_name], tensor):
            why = "split over processes" if hasattr(own[tensor_name], "device_mesh") else "quantised"
            raise ValueError(f"{where} cannot be one like the model's, whose {tensor_name!r} is {why}")
        if own[tensor_name].is_meta:
            raise ValueError(
                f"{where} cannot be one like the model's, whose {tensor_name!r} is not in memory: it is offloaded, or "
                "has no weights yet. Load the model without offloading that module"
            )
        if theirs != ours and not (resizes and theirs[1:] == ours[1:] and len(theirs) == len(ours)):
            hint = "" if theirs[1:] != ours[1:] else ": load the model with as many rows there (num_labels=… of a head)"
            raise ValueError(f"{where} has {tensor_name!r} of shape {theirs}, the model's is {ours}{hint}")
        if own[tensor_name].is_floating_point() != tensor.is_floating_point():
            raise ValueError(
                f"{where} has {tensor_name!r} of dtype {tensor.dtype}, the model's is {own[tensor_name].dtype}"
            )
        if len({len(each) for each in state.values() if each.dim()}) > 1 and theirs != ours:
            raise ValueError(
                f"{where} has another number of rows in {tensor_name!r}, {theirs}, than in {sorted(state)}"
            )
        if tensor.is_floating_point() and not tensor.to(own[tensor_name].dtype).isfinite().all():
            why = "training diverged or the file is damaged" if not tensor.isfinite().all() else "they are too large"
            raise ValueError(f"{where} has a NaN or inf in {tensor_name!r} in {own[tensor_name].dtype}: {why}")


def _is_packed(own: Tensor, given: Tensor) -> bool:
    return own.dtype in (torch.int8, torch.uint8, torch.int32) and given.is_floating_point()


def _listed(state: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in state.items())


def _kept(module: nn.Module) -> dict[int, Any]:
    """What a deep copy of `module` shares with it: what is replaced in it, what patching put there, and hooks."""
    kept: dict[int, Any] = {}
    for part in module.modules():
        held = vars(part)
        shared = [value for key, value in held.items() if key.startswith("ia3_") or key in HUNG_ON]
        shared += [tensor for tensor in part._parameters.values() if tensor is not None]
        kept.update((id(value), value) for value in shared)
    return kept | {PLAIN: True}


def _put(module: nn.Module, name: str, tensor: Tensor, resizes: bool) -> None:
    path, _, last = name.rpartition(".")
    part = module.get_submodule(path)
    before: Tensor = getattr(part, last)
    value = tensor.detach().to(before.device, before.dtype, copy=True)
    if last in part._parameters:
        part._parameters[last] = nn.Parameter(value, requires_grad=False)
    else:
        part._buffers[last] = value
    if resizes and last == "weight":
        for attribute in ("num_embeddings", "out_features"):
            if hasattr(part, attribute):
                setattr(part, attribute, len(value))


def _tie(module: nn.Module, made: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Lets what is one parameter within the model's module be one in its copy, where it has one content."""
    first: dict[int, tuple[str, nn.Parameter | None]] = {}
    for name, tensor in state.items():
        path, _, last = name.rpartition(".")
        parameter, part = module.get_submodule(path)._parameters.get(last), made.get_submodule(path)
        if parameter is not None:
            known, tied = first.setdefault(id(parameter), (name, part._parameters[last]))
            if torch.equal(state[known].to(tensor), tensor):
                part._parameters[last] = tied


def tensors_of(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The parameters of a module that can be trained: the part that holds each, and its name there."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                yield part, name, parameter
