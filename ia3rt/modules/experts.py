"""The drop-in of experts that are kept as one tensor a matrix: each expert's matrices wear vectors of its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ia3rt.modules.experts_forms import form_of, interface_of
from ia3rt.modules.experts_paths import Acting, Scales, by_implementation, flat, sorted_by_expert
from ia3rt.modules.experts_trial import computes_as_known
from ia3rt.modules.set_forward import keeps_class_forward
from ia3rt.modules.sharding import is_split, is_tensor_parallel
from ia3rt.modules.tried import PLAIN_DTYPES
from ia3rt.modules.wearer import How, Wearer, original_class
from ia3rt.routing.routing import routing_of
from ia3rt.routing.worn import Worn

_OWN = None, "eager"  # what configs call the class's own forward


class IA3Experts(Wearer):
    """Experts that are computed by transformers' functions: s_out acts at the first matrices' output, s_in at the
    second ones' input.

    Attributes:
        ia3_names: how the original forward calls its arguments.
        ia3_tried: whether it is known to compute as its class's own forward does.
    """

    ia3_names: ClassVar[tuple[str, ...]]
    ia3_tried: bool = False

    def __init_subclass__(cls) -> None:
        """Looks at the original class once, when the drop-in class is made."""
        super().__init_subclass__()
        forward = inspect.unwrap(original_class(cls).forward)  # type: ignore[attr-defined]
        cls.ia3_names = tuple(inspect.signature(forward).parameters)[1:]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """down(s_in ∘ act(s_out ∘ (gate_up x + bias))) + bias of each expert, weighted and summed for each token."""
        given = (*args, *(kwargs[name] for name in type(self).ia3_names[len(args) :])) if kwargs else args
        worn, tokens = self.ia3_worn(), self._ia3_tokens(given[0])
        up, down = (self._ia3_scales(position, tokens, worn) for position in (self.ia3_out, self.ia3_in))
        if up is None and down is None:
            y = super().forward(*args, **kwargs)
        else:
            y = self._ia3_compute(Acting(up, down), *given)
        routing_of(self.ia3_key).rows.carry(given[0], y)
        return y

    def _ia3_scales(self, position: int | None, tokens: Tensor, worn: Worn) -> Scales | None:
        found = None if position is None else routing_of(self.ia3_key).rows.numbered(self, position, tokens, worn)
        return None if found is None else Scales(found[0].view(len(found[0]), self.ia3_experts, -1), found[1])

    def _ia3_tokens(self, x: Tensor) -> Tensor:
        """[…, features], whose places are the tokens, each once."""
        return x

    def _ia3_compute(self, acting: Acting, *given: Tensor) -> Tensor:
        config: Any = self.config
        implementation = config._experts_implementation  # it may be another one than when it was patched
        is_own = implementation in _OWN
        if not (is_own and self.ia3_tried):
            why = _why_not_by(self, implementation)
            if why is not None:
                raise ValueError(f"{original_class(type(self)).__name__} {why}")
            self.ia3_tried |= is_own
        return by_implementation(self, acting, *given)

    @property
    def ia3_experts(self) -> int:
        """How many there are."""
        return self.num_experts  # type: ignore[return-value]

    def ia3_hows(self, rows: int) -> dict[int, How]:
        """As `forward` does."""
        how = How("multiplication", "", "between the matrices, of each pair of a token and an expert")
        return {position: how for position in (self.ia3_in, self.ia3_out) if position is not None}


class IA3FlatExperts(IA3Experts):
    """The same for experts whose matrices lie below each other in one."""

    def _ia3_compute(self, acting: Acting, *given: Tensor) -> Tensor:
        return flat(self, acting, *given)


class IA3SortedExperts(IA3Experts):
    """The same for experts that are given all tokens for each of them."""

    def _ia3_tokens(self, x: Tensor) -> Tensor:
        return x.view(self.ia3_experts, -1, x.shape[-1])[0]

    def _ia3_compute(self, acting: Acting, *given: Tensor) -> Tensor:
        return sorted_by_expert(self, acting, *given)

    @property
    def ia3_experts(self) -> int:
        """How many there are."""
        return len(self.gate_up_proj)  # type: ignore[arg-type]


def drop_in_of(experts: nn.Module) -> type[IA3Experts]:
    """The drop-in for experts of a known form."""
    form = form_of(experts)
    return IA3FlatExperts if form == "flat" else IA3SortedExperts if form == "sorted" else IA3Experts


def why_unworn(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """Why experts of a known form cannot wear vectors as they are now, the end of a sentence; None where they can.

    Args:
        modules: the model's, by path.
        path: the experts'.
    """
    experts: Any = modules[path]
    if not keeps_class_forward(experts):
        return "has a forward of its own, set by other code, which would hide its vectors"
    for name, parameter in experts.named_parameters():
        holder = ".".join(filter(None, [path, name.rpartition(".")[0]]))
        if is_tensor_parallel(modules, holder):
            return "is tensor-parallel: each process has a part of its weights, and vectors are of all of them"
        is_plain = type(parameter) is nn.Parameter or is_split(modules[holder])
        if not is_plain or parameter.dtype not in PLAIN_DTYPES:
            return f"keeps {name!r} as a {type(parameter).__name__} of {parameter.dtype}, which wears no vector"
    if getattr(experts, "_is_expert_parallel", False):
        return "has only some of the experts (expert parallelism), and vectors are of all of them"
    by_config = form_of(experts) == "by implementation"
    return _why_not_by(experts, experts.config._experts_implementation if by_config else "eager")


def _why_not_by(experts: Any, implementation: str | None) -> str | None:
    """The same of one way of computing: eager, the class's own, or a function of transformers."""
    if implementation in _OWN:
        if computes_as_known(experts):
            return None
        return (
            "computes one expert after another in a way that is not known: where the model has another, take that "
            "with model.set_experts_implementation('grouped_mm') or 'batched_mm'"
        )
    function = interface_of(original_class(type(experts))).get(implementation)
    if implementation in ("batched_mm", "grouped_mm") and function.__module__ == "transformers.integrations.moe":
        return None
    return (
        f"computes by {implementation!r}, which has no place for a vector: take another with "
        "model.set_experts_implementation('grouped_mm'), 'batched_mm' or 'eager'"
    )
