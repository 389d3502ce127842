"""How a module comes to wear vectors: in place, by a class between it and its own; and how it is given back."""

from __future__ import annotations

import copy
import functools
import itertools
import sys
import warnings
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ia3rt.adapters.site import Side
from ia3rt.modules.offloading import execution_device
from ia3rt.modules.set_forward import cell_of_class_forward, is_class_forward
from ia3rt.routing.layout import Layout, Unknown
from ia3rt.routing.routing import Routing, routing_of
from ia3rt.routing.traced import is_traced
from ia3rt.routing.worn import Worn

PLAIN: Any = "ia3rt: a plain copy is meant"
"""In the memo of a deep copy of a part of a model, says so."""


class How(NamedTuple):
    """How a vector is applied.

    Attributes:
        kernel: the operation that it is part of.
        config: how that is launched; empty where there is nothing to choose.
        why: why this one.
    """

    kernel: str
    config: str
    why: str


class Wearer(nn.Module):
    """Mixed into the class of a patched module, in place: the module object, its parameters and hooks stay.

    Attributes:
        ia3_routing: what the model's rows wear, shared by all its patched modules.
        ia3_key: finds it where a compiler reads along.
        ia3_now: gives what they wear now, as it is read on the device of the module's vectors.
        ia3_in, ia3_out: the positions in the bank of the sites that act here; None where there is none.
        ia3_layouts: where the rows of a batch are in what is scaled here, by its number of dimensions.
        ia3_follow: lets the vectors at the module follow it, after it may have moved to another device.
    """

    ia3_routing: Routing
    ia3_key: int
    ia3_in: int | None
    ia3_out: int | None
    ia3_layouts: dict[int, Layout | Unknown]
    ia3_now: Callable[[], Worn]
    ia3_follow: Callable[[nn.Module], None]
    ia3_original: ClassVar[type]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Lets the bank follow `model.to(device)`."""
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.ia3_follow(self)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """With the whole model, a drop-in of its copy; else a plain module: no Runtime says what the part wears."""
        wears = self.ia3_original if self.ia3_routing.bank.adapters else None
        return deep_copy(self, memo, Wearer, self.ia3_routing, wears, unwrap)

    def __init_subclass__(cls) -> None:
        """Calls no further: what a layer's class does with its subclasses is not meant for drop-in classes."""

    def ia3_begin(self) -> None:
        """Looks at the module once, when it is made a drop-in."""

    def ia3_worn(self) -> Worn:
        """What the module's rows wear now."""
        return routing_of(self.ia3_key).traced() if is_traced() else self.ia3_now()

    def ia3_scale(self, position: int, x: Tensor, worn: Worn) -> Tensor | None:
        """What x, [..., width], is multiplied by; None where that is nothing.

        Raises:
            ValueError: rows wear different mixes, and it is not known whose each element of x is.
        """
        if not worn.by_row:
            return worn.composed.scale(position)
        return routing_of(self.ia3_key).rows.scale(self, position, x, worn)

    def ia3_is_row_major(self, position: int, x: Tensor, worn: Worn) -> bool:
        """Whether x, at a site, lies as the kernels read it where rows wear different mixes.

        Raises:
            ValueError: it is not known whose each element of x is.
        """
        return routing_of(self.ia3_key).rows.are_major(self, position, x, worn)

    def ia3_hows(self, rows: int) -> dict[int, How]:
        """What applies the vectors that this module applies, by position, for so many rows: see explanation.py."""
        raise NotImplementedError


def deep_copy(
    module: nn.Module,
    memo: dict[int, Any],
    mixin: type[nn.Module],
    routing: Routing,
    wears: type | None,
    give_back: Callable[[nn.Module], None],
) -> nn.Module:
    """A deep copy of a patched module: with the whole model, a patched one of its copy; else the plain module.

    Args:
        module: the module.
        memo: the deep copy's.
        mixin: what is mixed into its class, before its own.
        routing: the model's.
        wears: the module's own class, where a plain copy lacks what it may wear: a warning says so, once for a part.
        give_back: makes a module the plain one.

    Raises:
        ValueError: as `Routing.__deepcopy__`.
    """
    whole = routing.is_copied(memo)
    if not whole and wears is not None and PLAIN not in memo:
        memo[PLAIN] = True
        _warn_of_plain(wears)
    if not whole:
        routing.leave_out(memo)
        kept = [value for name, value in vars(module).items() if name.startswith("ia3_") and value is not routing]
        memo.update((id(value), value) for value in kept)
    made = _copied_as_pickle_does(module, memo, mixin)
    if not whole:
        for name in [name for name in made._parameters if name.startswith("ia3_")]:
            del made._parameters[name]
        give_back(made)
    elif "ia3_key" in vars(made):
        vars(made)["ia3_key"] = vars(made)["ia3_routing"].key
    return made


def _warn_of_plain(cls: type) -> None:
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] in ("ia3rt", "copy", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"a part of a patched model, with a {cls.__name__} that wears adapters, was copied by "
        "itself: the copy is plain and wears none. Copy the whole model, or unpatch() it before",
        stacklevel=level,
    )


def _copied_as_pickle_does(module: nn.Module, memo: dict[int, Any], mixin: type[nn.Module]) -> nn.Module:
    """A deep copy as copy.deepcopy makes it: by the original class's own way, where that has one."""
    own = getattr(super(mixin, module), "__deepcopy__", None)
    if own is not None:
        return own(memo)  # type: ignore[no-any-return]
    made = memo[id(module)] = type(module).__new__(type(module))
    made.__setstate__(copy.deepcopy(vars(module), memo))  # type: ignore[no-untyped-call]
    return made


def computing_tensor(module: nn.Module) -> Tensor:
    """A parameter or buffer that says where a module computes, and in what; GPTQ's layers have buffers only."""
    first: Tensor | None = None
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.dtype.is_floating_point:
            return tensor
        first = tensor if first is None else first
    assert first is not None
    return first


def computing_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate brings them to; meta where there are none."""
    device = computing_tensor(module).device
    if device.type != "meta":
        return device
    return next(filter(None, map(execution_device, module.modules())), device)


def original_class(cls: type) -> type:
    """The class that a patched module had."""
    return getattr(cls, "ia3_original", cls)


_patched: dict[tuple[type, type], type] = {}


def patched_class(mixin: type[Wearer], cls: type) -> type:
    """The drop-in class for modules of type `cls`, one and the same for all of them."""
    if (mixin, cls) not in _patched:
        namespace = {"__module__": __name__, "__doc__": f"{cls.__name__} with IA³.", "ia3_original": cls}
        name = f"IA3{cls.__name__}"
        if _starts_as_module(cls):
            _patched[mixin, cls] = type(name, (mixin, cls), namespace)
        else:
            _patched[mixin, cls] = _mixin_in_front(type(cls))(name, (cls, mixin), {**namespace, "ia3_mixin": mixin})
    return _patched[mixin, cls]


def _starts_as_module(cls: type) -> bool:
    """Whether objects of `cls` are laid out in memory as nn.Module's, as a class with a mixin in front is."""
    base: type | None = cls
    while base is not None and base is not nn.Module:
        base = base.__base__
    return base is not None


@functools.cache
def _mixin_in_front(metaclass: type[type]) -> type[type]:
    """A metaclass of classes (original, mixin) that look into the mixin first.

    Python lets an object change its class only where both are laid out alike, and that is decided by the first base:
    the original has to be that one, where it is no nn.Module by its own first base (a mixin of ABC, or of a protocol).
    Not for other classes, as Python caches no look-up in a class with an order of its own.
    """

    def mro(cls: Any) -> list[type]:
        original, _ = cls.__bases__
        ours = [base for base in cls.__dict__["ia3_mixin"].__mro__ if issubclass(base, Wearer)]
        return [cls, *ours, *original.__mro__]

    return type(f"MixinInFrontOf{metaclass.__name__}", (metaclass,), {"mro": mro})


def wrap(module: nn.Module, mixin: type[Wearer], routing: Routing, follow: Callable[[nn.Module], None]) -> None:
    """Turns `module` into its drop-in; it wears nothing until `place` says where its vectors are."""
    become(module, patched_class(mixin, type(module)))
    vars(module).update(ia3_routing=routing, ia3_key=routing.key, ia3_now=routing.now, ia3_follow=follow)
    vars(module).update(ia3_in=None, ia3_out=None, ia3_layouts={})
    module.ia3_begin()  # type: ignore[operator]


def place(module: nn.Module, side: Side, position: int | None) -> None:
    """Says which of the bank's sites scales the layer `module` at `side`; None for none."""
    vars(module).update({f"ia3_{side}": position, "ia3_prepared": {}})


def unwrap(module: nn.Module) -> None:
    """Makes `module` what it was before `wrap`, but for what other code made of its class since."""
    become(module, class_without(type(module), "ia3_original"))
    for name in [name for name in vars(module) if name.startswith("ia3_")]:
        del vars(module)[name]


def class_without(cls: type, name: str) -> type:
    """The class without one of ours that it is, or is made of: a class that parametrize or FSDP made of that is made of
    the original.

    It is one and the same for all modules of a class.

    Args:
        cls: the class.
        name: by which ours names the class that it was made of.
    """
    if not hasattr(cls, name):
        return cls
    if name in vars(cls):
        original: type = vars(cls)[name]
        return original
    made = _without.setdefault(cls, {})
    if name not in made:
        left = "__dict__", "__weakref__"
        held = {key: value for key, value in vars(cls).items() if key not in left and not key.startswith("ia3_")}
        ours = next(each for each in cls.__mro__ if name in vars(each))
        shorter = cls.__name__.replace(ours.__name__, vars(ours)[name].__name__)
        made[name] = type(shorter, tuple(class_without(base, name) for base in cls.__bases__), held)
    return made[name]


_without: weakref.WeakKeyDictionary[type, dict[str, type]] = weakref.WeakKeyDictionary()


def become(module: nn.Module, cls: type) -> None:
    """Gives a module another class."""
    # accelerate's device_map hooks keep the forward they replaced, and put it on the module when they are removed.
    # Where it is the class's, it has to be the present one's. One that other code had set is not, and stays.
    for kept in ("_old_forward", "forward"):
        if is_class_forward(vars(module).get(kept), module):
            vars(module)[kept] = MethodType(cls.forward, module)  # type: ignore[attr-defined]
    cell = cell_of_class_forward(module)  # so does the forward that splits a layer over processes
    if cell is not None:
        cell.cell_contents = MethodType(cls.forward, module)  # type: ignore[attr-defined]
    object.__setattr__(module, "__class__", cls)  # whatever its own __setattr__ forbids
