"""Whether experts compute in a way that is known: tried out on a few numbers, with and without vectors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ia3rt.modules import experts_paths
from ia3rt.modules.experts_forms import Form, Matrix, form_of, matrices_of
from ia3rt.modules.experts_paths import Acting, Scales
from ia3rt.modules.wearer import original_class

_EXPERTS, _TOKENS, _FEATURES, _WIDTH = 4, 6, 5, 3
_MAGNITUDES = 0.5, 40.0  # where an activation is steep, and where it is clamped
_OF_ALL = vars(nn.Module()).keys()  # hooks, tensors, other modules
_known: dict[object, bool] = {}


def computes_as_known(experts: Any) -> bool:
    """Whether `experts`, of a known form, computes as the path of that form does where it is a class's own forward.

    Its forward runs once over small matrices, random ones in float64, and once more over those multiplied by vectors:
    the path with these vectors has to give the same. It is done once for all layers of a model that are set alike.
    """
    key = tuple(_settings(module) for module in experts.modules())
    if key not in _known:
        form = form_of(experts)
        assert form is not None
        try:
            with torch.no_grad(), torch.random.fork_rng([]):
                torch.manual_seed(0)
                cases = product(_MAGNITUDES, (False, True))
                _known[key] = all(_agrees(experts, form, *case) for case in cases)
        except Exception:  # whatever a forward of unknown making raises over modules that it was not made for
            _known[key] = False
    return _known[key]


def _settings(module: Any) -> tuple[object, ...]:
    """What a module's forward may go by beside tensors: its code, its attributes, and those of its config."""
    cls: Any = original_class(type(module))
    held = {name: value for name, value in vars(module).items() if name not in _OF_ALL and not name.startswith("ia3_")}
    for name, value in held.items():
        if isinstance(value, Tensor):
            held[name] = id(value)
        elif not callable(value):
            held[name] = getattr(value, "__dict__", value)
    return cls, cls.forward, repr(held)


class _Small:
    """A module with other tensors and sizes."""

    def __init__(self, module: Any, **held: Any) -> None:
        vars(self).update(held, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any) -> Any:
        return self._module(*args)


def _agrees(experts: Any, form: Form, magnitude: float, training: bool) -> bool:
    sizes = dict(training=training, num_experts=_EXPERTS, hidden_size=_FEATURES, ffn_hidden_size=_WIDTH)
    forward: Any = original_class(type(experts)).forward  # type: ignore[attr-defined]
    path: Any = experts_paths.flat if form == "flat" else experts_paths.sorted_by_expert
    if form == "by implementation":
        forward, path = forward.__wrapped__, experts_paths.by_expert
    tensors = {
        name: magnitude * torch.randn(shape, dtype=torch.float64, device="cpu")
        for name, shape in _shapes(experts, form)
    }
    inputs = _inputs(form)
    matrices = matrices_of(experts)
    tables = [torch.rand(_EXPERTS, _width(matrix), dtype=torch.float64, device="cpu") + 0.5 for matrix in matrices]
    scaled = dict(tensors)
    for matrix, table in zip(matrices, tables, strict=True):
        of_one = [_EXPERTS, 1, 1]
        of_one[matrix.dim] = -1
        tensor = tensors[matrix.name]
        scaled[matrix.name] = (tensor.view(_EXPERTS, -1, tensor.shape[-1]) * table.view(of_one)).view(tensor.shape)
        if matrix.bias:
            scaled[matrix.bias] = tensors[matrix.bias] * table
    acts = {matrix.side: Scales(table.unsqueeze(0), None) for matrix, table in zip(matrices, tables, strict=True)}
    for held, acting in ((tensors, Acting(None, None)), (scaled, Acting(acts.get("out"), acts.get("in")))):
        truth = forward(_small(experts, form, held, sizes), *inputs)
        ours = path(_small(experts, form, tensors, sizes), acting, *inputs)
        if not torch.allclose(ours, truth, rtol=1e-9, atol=0.0):
            return False
    return True


def _small(experts: Any, form: Form, tensors: dict[str, Tensor], sizes: dict[str, int]) -> _Small:
    if form == "flat":
        inner = {name.removeprefix("mlp."): tensor for name, tensor in tensors.items()}
        return _Small(experts, **sizes, mlp=_Small(experts.mlp, **inner))
    after = {} if getattr(experts, "post_expert_norm", None) is None else {"post_expert_norm": nn.Hardtanh(-1.0, 2.0)}
    return _Small(experts, **sizes, **tensors, **after)


def _width(matrix: Matrix) -> int:
    return _WIDTH if matrix.side == "in" or matrix.name == "up_proj" else 2 * _WIDTH


def _shapes(experts: Any, form: Form) -> Iterator[tuple[str, tuple[int, ...]]]:
    if form == "flat":
        yield from ((f"mlp.{name}", (_EXPERTS * _WIDTH, _FEATURES)) for name in ("w1", "v1", "w2"))
        return
    for matrix in matrices_of(experts):
        width = _width(matrix)
        yield matrix.name, (_EXPERTS, width, _FEATURES) if matrix.dim == 1 else (_EXPERTS, _FEATURES, width)
        if matrix.bias:
            yield matrix.bias, (_EXPERTS, width)
    if form == "by implementation" and experts.has_bias:
        yield "down_proj_bias", (_EXPERTS, _FEATURES)


def _inputs(form: Form) -> tuple[Tensor, ...]:
    if form == "sorted":
        return (torch.randn(_EXPERTS * _TOKENS, _FEATURES, dtype=torch.float64, device="cpu"),)
    x = torch.randn(_TOKENS, _FEATURES, dtype=torch.float64, device="cpu")
    index = torch.stack([torch.randperm(_EXPERTS - 1, device="cpu")[:2] for _ in range(_TOKENS)])  # one has no tokens
    weights = torch.rand(_TOKENS, 2, dtype=torch.float64, device="cpu")
    return (x.view(2, -1, _FEATURES) if form == "flat" else x), index, weights
