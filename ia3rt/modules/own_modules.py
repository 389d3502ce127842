"""The modules that adapters bring with their vectors: kept, worn, trained, merged and given back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ia3rt.adapters.adapter import Adapter
from ia3rt.modules.brought import Brought
from ia3rt.modules.copied import copied, own_state, tensors_of
from ia3rt.modules.memory import Memory
from ia3rt.modules.own_reached import OwnReached
from ia3rt.modules.swapping import OwnOfOne, Swapping, lay, lift
from ia3rt.modules.wearer import Wearer
from ia3rt.routing.hooks import Hook
from ia3rt.routing.routing import Routing
from ia3rt.routing.trained_parameters import make_plain


class OwnModules:
    """All adapters' own modules of one patched model. The model's parameters do not have them, until they are trained.

    Args:
        model: the model.
        routing: what its rows wear.
    """

    def __init__(self, model: nn.Module, routing: Routing) -> None:
        self._model = model
        self._routing = routing
        self._held: dict[str, OwnOfOne] = {}
        self._reached = OwnReached(model, routing)
        self._resized: dict[Adapter, str] = {}
        self._hook: RemovableHandle | None = None  # where there are such

    def build(self, name: str, brought: Brought) -> dict[str, nn.Module]:
        """Makes an adapter's own modules, by path; `keep` makes them worn.

        Raises:
            ValueError: one does not fit the model.
        """
        built: dict[str, nn.Module] = {}
        for path, state in brought.states.items():
            built[path] = copied(self._model, name, path, state, path in brought.embeddings)
        for path in brought.states:
            outer = next((each for each in brought.states if path.startswith(f"{each}.")), None)
            if outer is not None:
                raise ValueError(
                    f"adapter {name!r} has its own {outer!r} and its own {path!r} in it: bring the outer one"
                )
        self._tie(brought, built)
        return built

    def keep(self, adapter: Adapter, built: Mapping[str, nn.Module]) -> None:
        """Lets rows that wear `adapter` go through its own modules."""
        for path, own in built.items():
            own.train(self._model.get_submodule(path).training)
            if path in adapter.embeddings and _rows(own) != _rows(self._model.get_submodule(path)):
                self._resized[adapter] = path
        for path, own in built.items():
            held, module = self._held.get(path), self._model.get_submodule(path)
            if held is not None and not held.own and held.module is not module:  # replaced when nobody had its own
                lift(held.module)
                held = None
            if held is None:
                held = self._held[path] = OwnOfOne(path, module, self._routing)
                lay(module, held)
            held.add(adapter, own)
        self._look_within()
        self._hook_on()

    def drop(self, adapter: Adapter) -> None:
        """Forgets an adapter's own modules."""
        for path in adapter.modules:
            self._held[path].remove(adapter)
        self._resized.pop(adapter, None)
        self._look_within()
        self._hook_on()

    def states(self, adapters: Iterable[Adapter]) -> Brought:
        """The tensors of these adapters' own modules, as they are now."""
        brought = Brought()
        for adapter in adapters:
            for path in sorted(adapter.modules):
                held = self._held[path]
                held.follow()
                brought.states[path] = own_state(held.own[adapter])
            brought.embeddings |= adapter.embeddings
        return brought

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """A context in which the model's modules have the classes that they have without these."""
        for held in self._held.values():
            lift(held.module)
        try:
            yield
        finally:
            for held in self._held.values():
                lay(held.module, held)
            self._look_within()

    def train(self, adapters: Iterable[Adapter]) -> list[nn.Parameter]:
        """Makes the own modules of adapters parameters of the model, until `end_training`; saved embeddings stay.

        They stand in the model's module as `ia3_own_<adapter>_<name in the module>`, with dots as underscores.

        Raises:
            ValueError: such a name is taken.
        """
        found = self._training_places(adapters)
        for held, module, name, part, last, parameter in found:
            parameter.requires_grad = True
            module.register_parameter(name, parameter)
            held.in_training.append((name, part, last))
        return list({id(parameter): parameter for *_, parameter in found}.values())

    def check_names(self, adapters: Iterable[Adapter]) -> None:
        """Raises ValueError where a name is taken that `train` would need."""
        self._training_places(adapters)

    def _training_places(
        self, adapters: Iterable[Adapter]
    ) -> list[tuple[OwnOfOne, nn.Module, str, nn.Module, str, nn.Parameter]]:
        """Of each parameter: whose place it is in, where it goes and by which name, and where it is."""
        found: list[tuple[OwnOfOne, nn.Module, str, nn.Module, str, nn.Parameter]] = []
        names: dict[int, str] = {}  # a parameter that is tied within a module stands there once
        for adapter in sorted(adapters, key=lambda adapter: adapter.row):
            for path in sorted(adapter.modules - adapter.embeddings):
                own, module = self._held[path].own[adapter], self._held[path].module
                places = {id(part): prefix for prefix, part in own.named_modules()}
                for part, last, parameter in tensors_of(own):
                    place = f"{places[id(part)]}.{last}".lstrip(".")
                    name = names.get(id(parameter)) or f"ia3_own_{adapter.name}_{place}".replace(".", "_")
                    is_taken = id(parameter) not in names and any(module is m and name == n for _, m, n, *_ in found)
                    names[id(parameter)] = name
                    if hasattr(module, name) or is_taken:
                        raise ValueError(
                            f"adapter {adapter.name!r} cannot be trained: {path!r} has a {name!r} already; give the "
                            "adapter another name"
                        )
                    found.append((self._held[path], module, name, part, last, parameter))
        return found

    def make_plain(self) -> None:
        """Makes parameters again of what other code computes in the places of those that are trained."""
        for held in self._held.values():
            for name, part, last in held.in_training:
                make_plain(held.module, name)
                held.module._parameters.setdefault(name, part._parameters[last])  # where it was taken away

    def end_training(self) -> None:
        """Ends what `train` began: the own modules keep what they learned."""
        for held in self._held.values():
            module = held.module
            held.follow()
            for name, part, last in held.in_training:
                module._parameters.pop(name, None)
                parameter = part.get_parameter(last)
                parameter.requires_grad, parameter.grad = False, None
            held.in_training.clear()

    def merge(self, adapters: Collection[Adapter], replace: Callable[[str, Tensor, Tensor], None]) -> None:
        """Writes adapters' own modules over the model's, for export, while these are `lifted`.

        Args:
            adapters: whose.
            replace: (the module's path, a tensor of the model's, its new content) writes it, and remembers the old one.

        Raises:
            ValueError: two adapters have their own of one module; or one has another number of rows than the model's,
                or shares its weight with what stays.
        """
        owners: dict[str, str] = {}
        for adapter in adapters:
            for path in sorted(adapter.modules):
                if owners.setdefault(path, adapter.name) != adapter.name:
                    raise ValueError(
                        f"cannot merge adapter {adapter.name!r}: it has its own {path!r}, and so has "
                        f"{owners[path]!r}, which is merged"
                    )
        states = self.states(adapters).states
        memory = Memory(self._model)
        written: set[int] = set()  # tied embeddings are one tensor, of which the first content has to be remembered
        for path, state in states.items():
            module = self._held[path].module
            tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
            tensors.update(module.named_buffers(remove_duplicate=False))
            _check_shared(self._model, memory, path, states)
            for name, value in state.items():
                if tensors[name].shape != value.shape:
                    raise ValueError(
                        f"cannot merge the own {path!r}: its {name!r} is {tuple(value.shape)}, the model's "
                        f"{tuple(tensors[name].shape)}; call model.resize_token_embeddings({len(value)}) before patch()"
                    )
                if id(tensors[name]) not in written:
                    replace(path, tensors[name], value)
                    written.add(id(tensors[name]))

    def begin(self) -> None:
        """Takes `end` back."""
        for held in self._held.values():
            lay(held.module, held)
        self._look_within()
        self._hook_on()

    def end(self) -> None:
        """Gives the model's modules back."""
        self._reached.place({})
        self._hook_off()
        for held in self._held.values():
            lift(held.module)

    def _look_within(self) -> None:
        """Tells modules whether vectors or own modules act within them, and sees that they are reached."""
        for held in self._held.values():
            _, *parts = held.module.modules()
            acts = any(isinstance(part, (Wearer, Swapping)) for part in parts)
            held.runs_whole = acts or issubclass(held.cls, Wearer)
        self._reached.place({path: held.module for path, held in self._held.items() if held.own})

    def _hook_on(self) -> None:
        self._hook_off()
        if self._resized:
            before = Hook(self._routing, self._before_forward, self._before_forward)
            self._hook = self._model.register_forward_pre_hook(before, with_kwargs=True)

    def _hook_off(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pre-hook: models divide their logits by the vocabulary's size of their config for a loss."""
        if kwargs.get("labels") is None:
            return
        for mix in self._routing.route.mixes:
            for adapter in mix.adapters:
                if adapter in self._resized:
                    path = self._resized[adapter]
                    rows = _rows(self._held[path].own[adapter])
                    raise ValueError(
                        f"adapter {adapter.name!r} has {rows} saved embeddings, and the model, which computes a loss "
                        f"by its own number, has {_rows(self._held[path].module)}: call "
                        f"model.resize_token_embeddings({rows}) before patch()"
                    )

    def _tie(self, brought: Brought, built: Mapping[str, nn.Module]) -> None:
        """Lets saved embeddings that are one tensor share their memory, on one device."""
        first: dict[tuple[int, torch.device], nn.Parameter] = {}
        for path in brought.embeddings:
            weight = brought.states[path].get("weight")
            if weight is not None:
                part = built[path]
                own = part._parameters["weight"]
                assert own is not None
                part._parameters["weight"] = first.setdefault((weight.data_ptr(), own.device), own)


def _check_shared(model: nn.Module, memory: Memory, path: str, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raises ValueError where a tensor of the model's module stands elsewhere too, and is to be another one there."""
    parts = dict(model.get_submodule(path).named_modules(prefix=path, remove_duplicate=False))
    for name, value in states[path].items():
        holder, _, last = f"{path}.{name}".rpartition(".")
        tensor = parts[holder]._parameters.get(last, parts[holder]._buffers.get(last))
        for other in memory.others(parts[holder], last):
            whole = f"{other.path}.{other.name}"
            owner = next((own for own in states if whole.startswith(f"{own}.")), None)
            there = other.tensor if owner is None else states[owner].get(whole.removeprefix(f"{owner}."), other.tensor)
            is_one = other.tensor is tensor and there.shape == value.shape
            if not is_one or not torch.equal(there.to(value.device, value.dtype), value):
                is_weight = name == other.name == "weight"
                what, whose = ("its weight", other.path) if is_weight else (f"its {name!r}", whole)
                raise ValueError(
                    f"cannot merge the own {path!r}: the model's shares {what} with {whose!r}, which is another one "
                    "with the adapter: load the model without tying them (tie_word_embeddings=False), or give each "
                    "memory of its own (nn.Parameter(tensor.clone())), to merge it"
                )


def _rows(module: nn.Module) -> int:
    weight = module._parameters["weight"]  # and not what is worn in its place
    assert weight is not None
    return len(weight)
