"""A module in whose place rows go through their adapters' own: the same object, by a class made from its own."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ia3rt.adapters.adapter import Adapter
from ia3rt.adapters.outside_modes import outside_modes
from ia3rt.modules.chosen import Choice, choose
from ia3rt.modules.parts import by_row, giving, is_worn_part, means_the_models, reads_the_models, refuse_by_row
from ia3rt.modules.wearer import How, Wearer, become, class_without, computing_device, deep_copy, original_class, unwrap
from ia3rt.routing.route import Route
from ia3rt.routing.routing import Routing
from ia3rt.routing.traced import is_traced
from ia3rt.routing.trained_parameters import unregistered


class OwnOfOne:
    """The adapters' own of one of the model's modules.

    Attributes:
        path: the module's.
        module: the module.
        cls: its class without `Swapping`.
        own: by adapter.
        in_training: of each parameter that is trained, its name in the model's module, and the part of the adapter's
            own that holds it, by name.
        runs_whole: whether vectors or own modules act within the model's: they know the rows of the whole batch only.
    """

    def __init__(self, path: str, module: nn.Module, routing: Routing) -> None:
        self.path = path
        self.module = module
        self.cls = type(module)
        self.own: Mapping[Adapter, nn.Module] = {}
        self.in_training: list[tuple[str, nn.Module, str]] = []
        self.runs_whole = False
        self._device: torch.device | None = None  # where all of `own` are
        self._routing = routing
        self._chosen: tuple[weakref.ref[Route], Choice] | None = None  # what is worn no more holds no rows

    def choice(self) -> Choice:
        """What the rows of the forward at hand go through, on the device of the model's."""
        device = computing_device(self.module)  # accelerate moves weights without a word, and away in between
        if device != self._device and device.type != "meta":
            self._move(device)
        route = self._routing.now().route
        chosen = self._chosen
        if chosen is None or chosen[0]() is not route:
            chosen = self._chosen = weakref.ref(route), choose(route, self.path, self.own)
        return chosen[1]

    def add(self, adapter: Adapter, own: nn.Module) -> None:
        """Adds an adapter's own. What is there already goes on being worn meanwhile, in other threads too."""
        self.own = {**self.own, adapter: own}
        self._chosen = self._device = None

    def remove(self, adapter: Adapter) -> None:
        """Forgets an adapter's own."""
        self.own = {other: own for other, own in self.own.items() if other is not adapter}
        self._chosen = None

    @outside_modes
    def _move(self, device: torch.device) -> None:
        for own in self.own.values():
            own.to(device)
        self._device = device

    def copied(self, memo: dict[int, Any]) -> nn.Module:
        """The module's deep copy: with the whole model, one of its copy; else what it was before it was patched."""
        mixin = Wearer if isinstance(self.module, Wearer) else Swapping  # the last before the class's own
        wears = original_class(self.cls) if self.own else None
        return deep_copy(self.module, memo, mixin, self._routing, wears, _give_back)

    def is_looked_at(self) -> bool:
        """Whether it is seen in this forward where modules have their rows."""
        forward = self._routing.forward()
        return forward is not None and forward.marks is not None

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Lets it be known where the module has its rows, in a forward that is looked at for that."""
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and x.dim() > 1:
                self._routing.rows.see(module, self.path, x, self._routing.now())

    def check_rows(self, module: nn.Module, x: Tensor) -> None:
        """Raises ValueError where dimension 0 of x is not the rows of the batch, or it is not known."""
        layout = self._routing.rows.layout(module, f"the own modules {self.path!r}", x, self._routing.now())
        if layout.dim != 0 or layout.repeated or layout.images:
            raise ValueError(
                f"rows of the batch wear adapters with different modules {self.path!r}, and the rows are not "
                f"dimension 0 of what it got, {tuple(x.shape)}. Let all rows wear one adapter (set_adapter)"
            )

    def follow(self) -> None:
        """Takes trained parameters as they stand in the model: load_state_dict(assign=True) puts others there.

        Raises:
            RuntimeError: one is no parameter any more.
        """
        for name, part, last in self.in_training:
            standing = self.module._parameters.get(name)
            if standing is None:
                whose = next(adapter.name for adapter, own in self.own.items() if part in list(own.modules()))
                raise unregistered(name, whose, repr(self.path))
            part._parameters[last] = standing


class Swapping(nn.Module):
    """Mixed into the class of a module of which adapters have their own.

    Attributes:
        ia3_own: which these are.
    """

    ia3_own: OwnOfOne

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module that each row's adapter has gives for it; the model's own where it has none."""
        if torch.compiler.is_compiling():
            # What rows go through is looked up by adapter: traced, it would be compiled again for each of them.
            return _untraced()(self, *args, **kwargs)
        return self._swapped(*args, **kwargs)

    def _swapped(self, *args: Any, **kwargs: Any) -> Any:
        held = self.ia3_own
        if held.in_training:
            held.follow()
        if held.is_looked_at():
            held.see(self, args, kwargs)
        choice = held.choice()
        if choice.index is not None:
            return self._by_row(held, choice, args, kwargs)
        own = choice.modules[0]
        return self._models(*args, **kwargs) if own is None else own.forward(*args, **kwargs)

    def _models(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, which reads its own parts; past a forward set on it, as accelerate's, which called this."""
        own = plain(self)
        return type(own).forward(own, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """A part of what the rows go through, to whoever uses it without calling the module, as in PEFT.

        Raises:
            ValueError: rows go through different ones.
        """
        if "ia3_own" not in vars(self) or not is_worn_part(self, name):
            return super().__getattr__(name)
        if is_traced():
            return _untraced_part()(self, name)
        return super().__getattr__(name) if means_the_models(sys._getframe(1)) else _worn_part(self, name)

    def _by_row(self, held: OwnOfOne, choice: Choice, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        x = _only_tensor(held.path, (*args, *kwargs.values()))
        assert choice.index is not None
        held.check_rows(self, x)
        together: Tensor | None = None
        for module, each in zip(choice.modules, choice.rows(x.device), strict=True):
            run: Callable[..., Any] = self._models if module is None else module.forward
            if module is None and held.runs_whole:
                part = _rows_of(held.path, run(*args, **kwargs), x.shape[0]).index_select(0, each)
            else:
                some = x.index_select(0, each)
                given = tuple(some if value is x else value for value in args)
                named = {name: some if value is x else value for name, value in kwargs.items()}
                part = _rows_of(held.path, run(*given, **named), len(each))
            together = part.new_zeros(x.shape[0], *part.shape[1:]) if together is None else together
            together = together.index_copy(0, each, part)
        assert together is not None
        return together

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """As that of a `Wearer`."""
        return self.ia3_own.copied(memo)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Lets the adapters' own follow `model.to(…)`."""
        for own in self.ia3_own.own.values():
            own._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Any:
        """Lets the adapters' own follow `model.train()` and `model.eval()`."""
        for own in self.ia3_own.own.values():
            own.train(mode)
        return super().train(mode)


def _worn_part(module: Swapping, name: str) -> Any:
    held = module.ia3_own
    if held.in_training:
        held.follow()
    choice = held.choice()
    own = choice.modules[0]
    if choice.index is not None:
        return by_row(held.path, plain(module), name)
    return getattr(plain(module) if own is None else own, name)


def _whole(module: Swapping, name: str) -> nn.Module:
    """What all rows go through in the place of a container, of which `name` is asked."""
    held = module.ia3_own
    if reads_the_models():
        return plain(module)
    choice = held.choice()
    if choice.index is not None:
        raise refuse_by_row(held.path, name)
    own = choice.modules[0]
    return plain(module) if own is None else own


@functools.cache
def _untraced_part() -> Callable[..., Any]:
    untraced: Callable[..., Any] = torch.compiler.disable(_worn_part)  # type: ignore[no-untyped-call]
    return untraced


@functools.cache
def _untraced() -> Callable[..., Any]:
    # Not at the module's top: it imports torch's compiler.
    untraced: Callable[..., Any] = torch.compiler.disable(Swapping._swapped)  # type: ignore[no-untyped-call]
    return untraced


class SwappingWearer(Swapping):
    """The same for a module that wears vectors."""

    def ia3_hows(self, rows: int) -> dict[int, How]:
        """As the module does without this class."""
        return plain(self).ia3_hows(rows)  # type: ignore[operator, no-any-return]


def plain(module: Swapping) -> nn.Module:
    """The module by its class without `Swapping`: what that does depends on what class it is. It shares all it has."""
    cls: Any = class_without(type(module), _WITHOUT)
    same: nn.Module = cls.__new__(cls)
    object.__setattr__(same, "__dict__", vars(module))
    return same


_WITHOUT = "ia3_without"  # by which a class of these names the one that it was made of
_swapping: dict[type[nn.Module], type[nn.Module]] = {}


def lay(module: nn.Module, held: OwnOfOne) -> None:
    """Turns `module` into one in whose place its rows go through their adapters' own."""
    cls = held.cls = type(module)
    if cls not in _swapping:
        mixin = SwappingWearer if issubclass(cls, Wearer) else Swapping
        doc = f"{cls.__name__} that adapters have their own of."
        namespace = {"__module__": __name__, "__doc__": doc, _WITHOUT: cls, **giving(cls, _whole)}
        _swapping[cls] = type(f"Own{cls.__name__}", (mixin, cls), namespace)
    vars(module)["ia3_own"] = held
    vars(module).setdefault("ia3_layouts", {})
    become(module, _swapping[cls])


def lift(module: nn.Module) -> None:
    """Makes `module` what it was before `lay`."""
    become(module, class_without(type(module), _WITHOUT))
    del vars(module)["ia3_own"]
    if not isinstance(module, Wearer):
        del vars(module)["ia3_layouts"]


def _give_back(module: nn.Module) -> None:
    lift(module)
    if isinstance(module, Wearer):
        unwrap(module)


def _only_tensor(path: str, values: tuple[Any, ...]) -> Tensor:
    tensors = [value for value in values if isinstance(value, Tensor)]
    others = [value for value in values if not isinstance(value, (Tensor, bool, int, float, str, type(None)))]
    if len(tensors) != 1 or others or not tensors[0].dim():
        got = ", ".join(type(value).__name__ for value in values)
        raise ValueError(
            f"rows of the batch wear adapters with different modules {path!r}, but it takes ({got}): only one that "
            "takes a single tensor, with the rows as its dimension 0, can differ by row. Let all rows wear one adapter "
            "(set_adapter)"
        )
    return tensors[0]


def _rows_of(path: str, y: Any, rows: int) -> Tensor:
    if not isinstance(y, Tensor) or not y.dim() or y.shape[0] != rows:
        got = f"a tensor of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise ValueError(
            f"rows of the batch wear adapters with different modules {path!r}, but it gives {got} for {rows} rows: "
            "only one that gives a tensor, with the rows as its dimension 0, can differ by row. Let all rows wear one "
            "adapter (set_adapter)"
        )
    return y
