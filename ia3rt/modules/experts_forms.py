"""Experts that are kept as one tensor a matrix: which of their matrices wear vectors, and how they compute."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor, nn

from ia3rt.adapters.site import Side, Site
from ia3rt.modules.same_code import same_code
from ia3rt.modules.wearer import original_class

Form: TypeAlias = Literal["by implementation", "flat", "sorted"]
"""How experts compute: by the function that the model's config names, among those of transformers; in a loop over
matrices that lie below each other in one (DBRX); or all at once, of tokens that are sorted by expert (Llama 4)."""


class Matrix(NamedTuple):
    """A matrix of each expert, all of them in one tensor.

    Attributes:
        name: the tensor's, in the module of the experts.
        side: where the vectors act.
        shape: [experts, rows, columns], as the tensor is or is to be read.
        dim: over which dimension a vector goes.
        bias: the name of the biases [experts, width]; empty where there is none.
    """

    name: str
    side: Side
    shape: tuple[int, ...]
    dim: int
    bias: str = ""

    def site(self, path: str) -> Site:
        """The site of these matrices, in experts at `path`."""
        width, experts = self.shape[self.dim], self.shape[0]
        return Site(f"{path}.{self.name}" if path else self.name, self.side, experts * width, experts, self.name)


def form_of(experts: nn.Module) -> Form | None:
    """How a module computes that keeps all experts; None for one that does not, or in a way that is not known.

    By structure: whether it computes so is tried out by `computes_as_known` in experts_trial.py.
    """
    held, cls = experts._parameters, original_class(type(experts))
    up, down = held.get("gate_up_proj", held.get("up_proj")), held.get("down_proj")
    if up is not None and down is not None and up.dim() == down.dim() == 3:
        if interface_of(cls) is not None:
            return "by implementation"
        return "sorted" if "gate_up_proj" in held and _arguments(cls) == 1 else None
    inner = experts._modules.get("mlp")
    flat = [] if inner is None else [inner._parameters.get(name) for name in ("w1", "v1", "w2")]
    if flat and all(each is not None and each.dim() == 2 for each in flat) and hasattr(experts, "num_experts"):
        return "flat" if _arguments(cls) == 3 else None
    return None


def matrices_of(experts: Any) -> tuple[Matrix, ...]:
    """The matrices of experts of a known form that wear vectors: the first one's output, the second one's input."""
    form = form_of(experts)
    if form is None:
        return ()
    if form == "flat":
        rows, columns = experts.mlp.w2.shape
        return (Matrix("mlp.w2", "in", (experts.num_experts, rows // experts.num_experts, columns), 1),)
    transposed = form == "sorted" or experts.is_transposed
    up = "gate_up_proj" if "gate_up_proj" in experts._parameters else "up_proj"
    has_bias = form != "sorted" and experts.has_bias
    return (
        Matrix(up, "out", tuple(getattr(experts, up).shape), 2 if transposed else 1, f"{up}_bias" if has_bias else ""),
        Matrix("down_proj", "in", tuple(experts.down_proj.shape), 1 if transposed else 2),
    )


def matrix_at(modules: Mapping[str, nn.Module], path: str) -> tuple[str, Matrix] | None:
    """The matrices that a path means, and the path of the module that keeps them; None where it means none."""
    parts = path.split(".")
    for depth in range(len(parts) - 1, max(len(parts) - 3, -1), -1):
        parent, name = ".".join(parts[:depth]), ".".join(parts[depth:])
        for matrix in matrices_of(modules[parent]) if parent in modules else ():
            if matrix.name == name:
                return parent, matrix
    return None


def expert_sites(modules: Mapping[str, nn.Module]) -> dict[str, Site]:
    """All sites at experts, by path, in the order of the modules."""
    sites = [matrix.site(path) for path, module in modules.items() for matrix in matrices_of(module)]
    return {site.path: site for site in sites}


def interface_of(cls: Any) -> Any:
    """Transformers' functions for experts, by name, as its decorator was given them; None for another class.

    They stand in what the decorator made the class's forward.
    """
    if not same_code(cls.forward, _dispatched(None, None)):
        return None
    names, cells = cls.forward.__code__.co_freevars, cls.forward.__closure__ or ()
    held: dict[str, Any] = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
    return held.get("experts_interface")


def _dispatched(experts_interface: Any, original_forward: Any) -> Callable[..., Tensor]:
    """As that decorator's source is written."""

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        experts_forward = experts_interface.get_interface(self.config._experts_implementation, original_forward)
        return experts_forward(self, *args, **kwargs)

    return forward


def _arguments(cls: Any) -> int:
    return len(inspect.signature(cls.forward).parameters) - 1
