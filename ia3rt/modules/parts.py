"""What is read of a module of which adapters have their own: its parts are those of what the rows go through."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import Tensor, nn

_KINDS = ("_parameters", "_buffers", "_modules")
_BY_ROW = (
    "rows of the batch wear adapters with different modules {path!r}, and {what} of it is used past the module itself, "
    "which only a call of the module can tell by row. Let all rows wear one adapter (set_adapter)"
)

# Of a tensor that differs by row, what does not differ: models read it of a weight, to convert what they give it.
_TOLD = {
    *(getattr(Tensor, each).__get__ for each in ("device", "dtype", "layout", "ndim", "requires_grad", "shape")),
    *(getattr(Tensor, each).__get__ for each in ("is_cpu", "is_cuda", "is_leaf", "is_meta", "is_quantized")),
    *(Tensor.__len__, Tensor.dim, Tensor.element_size, Tensor.is_complex, Tensor.is_floating_point),
    *(Tensor.ndimension, Tensor.nelement, Tensor.numel, Tensor.size),
}

# What torch's containers give their modules by, and what it takes to know of them no module.
_GIVING = ("__getitem__", "__iter__", "__reversed__", "get", "items", "values")


# torch's ways to a part by its path, as state_dict() names it, mean the model's own. transformers ties weights by them.
_BY_PATH = frozenset({"torch.nn.modules.module"})

# Who makes the model's new parts of those that it has, and puts them there: what stays is no adapter's.
_MAKERS = frozenset({"transformers.initialization", "transformers.modeling_utils"})
_LIBRARIES_OF_MAKERS = ("torch.ao.", "torch.nn.utils.", "torchao.", "transformers.quantizers.")

# Models have these for who makes parts, and for others: who calls them asks.
_ON_BEHALF = frozenset(
    {"_init_weights", "base_model", "enable_input_require_grads", "get_input_embeddings", "get_output_embeddings"}
)


class _Here(threading.local):
    reads_models = False


_here = _Here()


class ReadingTheModels:
    """A context in which this thread reads the model's own parts, whatever is worn, as who changes adapters has to."""

    def __enter__(self) -> None:
        """Begins it. A class, as a switch enters one: a generator takes three times as long."""
        self._before, _here.reads_models = _here.reads_models, True

    def __exit__(self, *error: object) -> None:
        """Ends it."""
        _here.reads_models = self._before


def reads_the_models() -> bool:
    """Whether this is such a context."""
    return _here.reads_models


def means_the_models(asking: FrameType) -> bool:
    """Whether who asks for a part goes by its path in the model, or makes the model's new one of it."""
    while asking.f_code.co_name in _ON_BEHALF and asking.f_back is not None:
        asking = asking.f_back
    name = asking.f_globals.get("__name__", "")
    return name in _BY_PATH or name in _MAKERS or name.startswith(_LIBRARIES_OF_MAKERS)


def is_worn_part(module: nn.Module, name: str) -> bool:
    """Whether `name` is a parameter, buffer or module that `module` holds, and is read as what is worn says."""
    held = vars(module)
    return not _here.reads_models and not name.startswith("ia3_") and any(name in held[kind] for kind in _KINDS)


def by_row(path: str, models: nn.Module, name: str) -> Any:
    """What `name` of the model's module is where rows go through different ones.

    A tensor that tells what it is, and computes nothing; None where it is None.

    Raises:
        ValueError: it is a module.
    """
    part = getattr(models, name)
    if part is None:
        return None
    refusal = _BY_ROW.format(path=path, what=repr(name))
    if not isinstance(part, Tensor):
        raise ValueError(refusal)
    apart: Apart = part.detach().as_subclass(Apart)
    apart.ia3_refusal = refusal
    return apart


class Apart(Tensor):
    """A tensor of the model's module where rows go through different ones, and so through different tensors.

    Attributes:
        ia3_refusal: the error where it would be computed with.
    """

    ia3_refusal: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Tells what it is.

        Raises:
            ValueError: it would be computed with.
        """
        if func in _TOLD:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        found: list[Any] = [*args, *(kwargs or {}).values()]
        while not isinstance(found[0], Apart):
            each = found.pop(0)
            found.extend(each if isinstance(each, (list, tuple)) else ())
        raise ValueError(found[0].ia3_refusal)


def giving(cls: type[nn.Module], whole: Callable[[Any, str], nn.Module]) -> dict[str, Any]:
    """For a container's class, its ways to give what it holds, as those of what is worn in its place.

    Args:
        cls: the class; most are no container.
        whole: gives what is worn in the place of a module; and is told what is asked, for its error.
    """

    def way(name: str) -> Callable[..., Any]:
        def give(self: Any, *args: Any, **kwargs: Any) -> Any:
            worn = whole(self, name)
            return getattr(type(worn), name)(worn, *args, **kwargs)

        return give

    return {name: way(name) for name in _GIVING if hasattr(cls, name)}


def refuse_by_row(path: str, name: str) -> ValueError:
    """The error where `name` of a container would give modules."""
    return ValueError(_BY_ROW.format(path=path, what=f"what {name}() gives"))
