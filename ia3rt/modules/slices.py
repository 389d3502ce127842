"""Which columns of a fused projection's output are its q, k and v, or its gate and up: seen by what is done with them.

No table of layouts and no module's attribute says it, as what these say of a fork is a guess. The module around the
projection is run on a few tokens, with random numbers in the place of the projection's output, and the gradient of what
it gives says of each column what it is. With softmax attention, and r some direction of the output at the last token:

    v   of one token alone, the output is its v: there the gradient of v is not zero, and that of q and k is
    k   the gradient of k and v of earlier tokens is not zero, that of q is, exactly: the output does not depend on it

and the output is linear in v, so that other values leave the gradient of v as it is, and change that of each k. A gate
and what it multiplies, W (act(gate) ∘ up), are told apart the same way. Where something else is seen, the layer is
refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ia3rt.adapters.site import Slices
from ia3rt.modules.wearer import computing_device, computing_tensor, original_class

_KINDS = ("q", "k", "v"), ("gate", "up")
_ROWS = 8  # so that no column's gradient is small by chance
_TOKENS = 3
_ZERO = 1e-4  # of the largest gradient: what is less is nothing


class _Call(NamedTuple):
    """What a module is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def find_slices(
    model: nn.Module, modules: Mapping[str, nn.Module], wanted: Mapping[str, Sequence[str]]
) -> dict[str, Slices]:
    """Where the named parts of fused projections are in their outputs.

    Args:
        model: the model, which is run on a few tokens, as far as the modules around the projections.
        modules: its modules, by path.
        wanted: by a projection's path, the names of its parts: some of q, k and v, or of gate and up.

    Raises:
        ValueError: a name is none of these, a projection has no such part, or it cannot be seen where its parts are.
    """
    for path, names in wanted.items():
        if not names or not any(set(names) <= set(kind) for kind in _KINDS):
            raise ValueError(
                f"slices {tuple(names)!r} of module {path!r}: they are some of 'q', 'k' and 'v', or of 'gate' and "
                "'up', and None is the whole module"
            )
    if not wanted:
        return {}
    found = {}
    with torch.inference_mode(False), _in_evaluation(model):
        calls = _Calls(model, modules, list(wanted))
        for path, names in wanted.items():
            roles = _roles(calls, modules, path, "q" in names or "k" in names or "v" in names)
            absent = [name for name in names if name not in roles]
            if absent:
                there = ", ".join(dict.fromkeys(roles))
                raise ValueError(f"module {path!r} has no slice {absent[0]!r}: those of its output are {there}")
            found[path] = Slices(tuple(sorted(set(names))), tuple(_ranges([role in names for role in roles])))
    return found


class _Calls:
    """What the modules around projections are called with by their model, by their class and the number of tokens."""

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], paths: Sequence[str]) -> None:
        self._model = model
        self._device = computing_device(modules[paths[0]])
        if self._device.type == "meta":
            raise ValueError(
                f"cannot see where the slices of {paths[0]!r} are: the model has no weights yet (they are on the meta "
                "device): load them before patch()"
            )
        self._around = list(dict.fromkeys(modules[path.rpartition(".")[0]] for path in paths))
        self._seen = {tokens: self._see(tokens) for tokens in (1, _TOKENS)}

    def have(self, around: nn.Module) -> bool:
        """Whether a forward of the model with input_ids came to a module of this one's class."""
        return all(original_class(type(around)) in seen for seen in self._seen.values())

    def of(self, around: nn.Module, layer: Any, tokens: int) -> _Call:
        """A call of `around`; with a tensor alone, where the model's forward does not come to a module of its class."""
        seen = self._seen[tokens].get(original_class(type(around)))
        if seen is None:
            width = layer.in_features if hasattr(layer, "in_features") else len(layer.weight)  # Conv1D's is transposed
            return _Call((computing_tensor(layer).new_zeros(_ROWS, tokens, width, device=self._device),), {})
        return copy.deepcopy(seen)  # as there

    def _see(self, tokens: int) -> dict[type, _Call]:
        seen: dict[type, _Call] = {}
        classes = {original_class(type(around)) for around in self._around}

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cls = original_class(type(module))
            if cls not in seen:
                seen[cls] = copy.deepcopy(_Call(args, kwargs))  # the forward goes on, and writes on a cache among them
            if seen.keys() == classes:
                raise _SeenAll

        ids = torch.arange(1, tokens + 1, device=self._device).expand(_ROWS, tokens).contiguous()
        inputs = {"input_ids": ids}
        if getattr(getattr(self._model, "config", None), "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids
        hooks = [around.register_forward_pre_hook(see, with_kwargs=True) for around in self._around]
        try:
            with torch.no_grad():
                self._model.forward(**inputs)
        except Exception:  # the modules that it came to are enough; those that it did not are called alone
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return seen


class _SeenAll(Exception):  # noqa: N818  (it is none)
    """Ends a forward that has been seen far enough."""


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Without dropout: no random number is drawn."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _roles(calls: _Calls, modules: Mapping[str, nn.Module], path: str, in_attention: bool) -> list[str]:
    """What each column of a projection's output is."""
    what = "q, k and v" if in_attention else "gate and up"
    refusal = f"cannot see which columns of the output of {path!r} are {what}: "
    advice = ". Name the whole module, with None for its slices, or leave it out"
    layer, around = modules[path], modules[path.rpartition(".")[0]]
    kind = original_class(type(around)).__name__
    how = "" if calls.have(around) else ", which the model's forward with input_ids does not reach,"
    if around is layer:
        raise ValueError(f"{refusal}it is the whole model{advice}")

    def gradients(tokens: int, values: Callable[[Tensor], Tensor], at: slice) -> tuple[Tensor, Tensor]:
        try:
            return _gradient(around, layer, tokens, calls.of(around, layer, tokens), values, at)
        except Exception as error:
            raise ValueError(
                f"{refusal}running the {kind} around it{how} on {tokens} tokens fails: {error}{advice}"
            ) from error

    roles = (_of_attention if in_attention else _of_gated)(gradients)
    runs = [(role, len(list(run))) for role, run in groupby(roles)]
    if "" in roles or any(len({length for each, length in runs if each == role}) > 1 for role in roles):
        raise ValueError(f"{refusal}the {kind} around it does something else with them{advice}")
    return roles


_Gradients = Callable[[int, Callable[[Tensor], Tensor], slice], tuple[Tensor, Tensor]]


def _of_attention(gradients: _Gradients) -> list[str]:
    """The role of each column of an attention's projection; "" where it has none of these."""
    last = slice(_TOKENS - 1, None)
    _, alone = gradients(1, lambda z: z, slice(None))
    z, beside = gradients(_TOKENS, lambda z: z, last)
    by_token = _size(beside, (0,))
    single, earlier, own = _size(alone, (0, 1)), _size(beside[:, : _TOKENS - 1], (0, 1)), by_token[-1]
    least = _ZERO * max(single.max(), earlier.max(), own.max())
    is_v, is_k = (single > least) & (earlier > least), (single <= least) & (earlier > least)
    is_q = (single <= least) & (earlier == 0) & (own > least)
    _, others = gradients(_TOKENS, lambda _: torch.where(is_v, z.flip(0).roll(1, 1), z), last)
    changed = _size(others - beside, (0, 1)) > least
    return [
        "v" if v and not c else "k" if k and c else "q" if q else ""
        for q, k, v, c in zip(is_q.tolist(), is_k.tolist(), is_v.tolist(), changed.tolist(), strict=True)
    ]


def _of_gated(gradients: _Gradients) -> list[str]:
    """The role of each column of a gated MLP's projection; "" where it has none of these, or both would do."""
    everywhere = slice(None)
    z, before = gradients(_TOKENS, lambda z: z, everywhere)
    width = z.shape[-1]
    place = torch.arange(width, device=z.device)
    least = _ZERO * _size(before, (0, 1)).max()
    fit = []
    for is_up in (place >= width // 2, place < width // 2, place % 2 == 1, place % 2 == 0):
        _, after = gradients(_TOKENS, lambda _, up=is_up: torch.where(up, z.flip(0).roll(1, 1), z), everywhere)  # type: ignore[misc]
        changed = _size(after - before, (0, 1)) > least
        if width % 2 == 0 and torch.equal(changed, ~is_up) and (_size(before, (0, 1)) > least).all():
            fit.append(is_up)
    return ["up" if up else "gate" for up in fit[0].tolist()] if len(fit) == 1 else [""] * width


def _size(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(x.float(), dim=dims)
    return size


def _gradient(
    around: nn.Module, layer: nn.Module, tokens: int, call: _Call, values: Callable[[Tensor], Tensor], at: slice
) -> tuple[Tensor, Tensor]:
    """What stood in the place of the layer's output [rows, tokens, width], and a gradient of what `around` gives by it.

    Args:
        around: the module that calls the layer.
        layer: the layer.
        tokens: how many tokens a row has.
        call: what `around` is called with.
        values: what is to stand there, of random numbers as many.
        at: the tokens whose outputs are differentiated, in a random direction.
    """
    put: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device="cpu").to(like.device, like.dtype)

    def replace(module: nn.Module, args: object, y: Tensor) -> Tensor:
        if put:
            raise ValueError("it calls the projection twice")
        if [each for each in y.shape[:-1] if each != 1] != [each for each in (_ROWS, tokens) if each != 1]:
            raise ValueError(f"the projection gives a tensor of shape {tuple(y.shape)} for {_ROWS} rows")
        z = random(y).reshape(_ROWS, tokens, y.shape[-1])
        put.append(values(z).detach().requires_grad_())
        return put[0].reshape(y.shape)

    hook = layer.register_forward_hook(replace)
    try:
        with torch.enable_grad():
            given = around(*call.args, **call.kwargs)
            if not put:
                raise ValueError("it does not call the projection")
            outputs = [given] if isinstance(given, Tensor) else list(given)
            y = next((each for each in outputs if isinstance(each, Tensor) and each.shape[:2] == (_ROWS, tokens)), None)
            if y is None:
                raise ValueError("it gives no tensor [rows, tokens, …]")
            (gradient,) = torch.autograd.grad((y * random(y))[:, at].sum(), put[0])
    finally:
        hook.remove()
    return put[0].detach(), gradient


def _ranges(kept: Sequence[bool]) -> Iterator[tuple[int, int]]:
    start = 0
    for is_kept, run in groupby(kept):
        stop = start + len(list(run))
        if is_kept:
            yield start, stop
        start = stop
