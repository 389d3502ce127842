"""Which of the model's modules an adapter brings its own of, by its config and by what its file holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ia3rt.adapters.checkpoint import Checkpoint
from ia3rt.adapters.given import check_mapping, check_tensors
from ia3rt.adapters.keys import modules_to_save, saved_paths, task_modules
from ia3rt.modules.copied import own_state, sharing


@dataclass
class Brought:
    """The tensors of an adapter's own modules.

    Attributes:
        states: by module path, by name: all of a module's.
        embeddings: which of them are saved embeddings.
    """

    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)

    def owner(self, path: str) -> str | None:
        """The own module that is, or holds, the model's at `path`; None where there is none."""
        return next((own for own in self.states if path == own or path.startswith(f"{own}.")), None)


def of_file(model: nn.Module, name: str, checkpoint: Checkpoint) -> Brought:
    """What an adapter brings by its files.

    Weights that modules_to_save does not name are the model's own, as PEFT saves them for resized embeddings or in a
    state_dict(), and as AdapterHub saves a head that was not trained: those that are as the model's bring nothing.

    Args:
        model: the model.
        name: the adapter's, for errors.
        checkpoint: the files.

    Raises:
        ValueError: modules_to_save names a module that the model has and the file does not hold, or the file holds
            other weights than the model's of a module that is neither named there nor an embedding.
    """
    brought = Brought()
    for path, state in checkpoint.modules.items():
        is_named = path not in checkpoint.unnamed
        if (not is_named or checkpoint.written_by == "AdapterHub") and _is_as(model, path, state):
            continue
        brought.states[path] = dict(state)
        if is_named:
            continue
        if path not in _embeddings(model):
            has = any(path == known for known, _ in model.named_modules())
            whose = "other ones than the model's" if has else f"a module that {type(model).__name__} lacks"
            raise ValueError(
                f"adapter {name!r} comes with weights for {path!r} ({', '.join(state)}), {whose}: they are no IA³ "
                "vectors, modules_to_save in its config does not name that module, and it is no embedding of the "
                "model. If they were trained with it, name it there"
            )
        brought.embeddings.add(path)
    for path in sorted(brought.embeddings):
        for other in sharing(model, path):
            if other not in brought.states and "weight" in brought.states[path]:
                own = own_state(model.get_submodule(other))
                brought.states[other] = {**own, "weight": brought.states[path]["weight"]}
                brought.embeddings.add(other)
    names = modules_to_save(checkpoint.config)
    for path in _named(model, names):
        if path not in brought.states:
            raise ValueError(
                f"adapter {name!r} has modules_to_save={list(names)}, which means the model's "
                f"{path!r}, but its file holds no weights for it: it was not saved whole, or for another task"
            )
    return _by_module(model, name, brought)


def of_tensors(
    model: nn.Module, name: str, modules: Mapping[str, Mapping[str, Tensor]] | None, config: Mapping[str, Any]
) -> Brought:
    """What an adapter made from tensors brings: those given, and the model's own where its config says so.

    Args:
        model: the model.
        name: the adapter's, for errors.
        modules: the tensors of its own modules; None where the config alone says which there are.
        config: what its adapter_config.json is to say.

    Raises:
        TypeError: modules are no mapping of paths to mappings of tensors.
        ValueError: modules_to_save names a module that the model lacks. Not where the tensors are given, which say what
            there is: PEFT takes such a name, and it means nothing.
    """
    if modules is not None:
        check_mapping(modules, f"the modules of adapter {name!r}", "state_dict()s")
        for path, state in modules.items():
            check_tensors(state, f"the modules of adapter {name!r} at {path!r}")
    names = modules_to_save(config)
    named = _named(model, names)
    paths = [path for path, _ in model.named_modules()]
    for each in names if modules is None else ():
        if each not in task_modules(config) and not saved_paths([each], paths):
            raise ValueError(
                f"adapter {name!r} has modules_to_save={list(names)}, but the model has no module {each!r}"
            )
    states = {path: own_state(model.get_submodule(path)) for path in named}
    return _by_module(
        model, name, Brought({**states, **{path: dict(state) for path, state in (modules or {}).items()}})
    )


def with_names(config: Mapping[str, Any], brought: Brought) -> dict[str, Any]:
    """The config, with a name in modules_to_save for each own module."""
    names = list(modules_to_save(config))
    named = [path for path in brought.states if path not in brought.embeddings]
    names += [path for path in named if not saved_paths(names, [path])]
    return {**config, "modules_to_save": names} if names else dict(config)


def _by_module(model: nn.Module, name: str, brought: Brought) -> Brought:
    """The same with one path for a module that the model has at several."""
    first = {id(module): path for path, module in model.named_modules()}
    paths = {path: first[id(module)] for path, module in model.named_modules(remove_duplicate=False)}
    single = Brought({}, {paths.get(path, path) for path in brought.embeddings})
    for path, state in brought.states.items():
        known = single.states.setdefault(paths.get(path, path), state)
        if known is state:
            continue
        if known.keys() != state.keys() or not all(torch.equal(known[each], state[each]) for each in state):
            raise ValueError(
                f"adapter {name!r} has its own {path!r} and another {paths[path]!r}, which are one module of the model"
            )
    return single


def _named(model: nn.Module, names: Collection[str]) -> list[str]:
    """The modules with anything to save that `names` means."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    return [path for path in saved_paths(names, paths) if own_state(model.get_submodule(path))]


def _is_as(model: nn.Module, path: str, state: Mapping[str, Tensor]) -> bool:
    """Whether the model has just these weights."""
    try:
        own = own_state(model.get_submodule(path))
    except AttributeError:
        return False
    same = (name in own and not own[name].is_meta and own[name].shape == each.shape for name, each in state.items())
    return all(same) and all(torch.equal(own[name].cpu(), each.to(own[name].dtype)) for name, each in state.items())


def _embeddings(model: nn.Module) -> set[str]:
    """The model's input and output embeddings, and what shares their weights."""
    found = []
    for method in ("get_input_embeddings", "get_output_embeddings"):
        ask = getattr(model, method, None)
        try:
            found.append(ask() if callable(ask) else None)
        except NotImplementedError:  # of a model without text
            continue
    paths = {path for path, module in model.named_modules(remove_duplicate=False) if any(module is e for e in found)}
    return paths | {other for path in paths for other in sharing(model, path)}
