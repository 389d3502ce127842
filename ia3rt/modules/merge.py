"""Merging what the rows wear into the weights, for export, and taking it back bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ia3rt.adapters.adapter import Adapter
from ia3rt.adapters.bank import Bank
from ia3rt.adapters.mix import Mix
from ia3rt.adapters.resolved import ResolvedMix
from ia3rt.adapters.shortened import some
from ia3rt.adapters.site import Site, SiteKey
from ia3rt.modules.channels import channel_weight, channel_widths, scaled_channels
from ia3rt.modules.experts_forms import matrices_of
from ia3rt.modules.memory import Memory, repeats
from ia3rt.modules.mergeable import mergeable_weight
from ia3rt.modules.offloading import execution_device
from ia3rt.modules.sharding import is_split
from ia3rt.modules.written import Written
from ia3rt.routing.composed import composed_vectors


class MergedWeights:
    """The mixes that are multiplied into a model's weights, and the weights as they were.

    Unmerging copies the originals back, since no division gives them back.

    Args:
        model: the model.
        bank: the adapters.
        write_own: writes adapters' own modules over the model's, by the function that it is given.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank,
        write_own: Callable[[Collection[Adapter], Callable[[str, Tensor, Tensor], None]], None],
    ) -> None:
        self._model = model
        self._bank = bank
        self._write_own = write_own
        self._mixes: list[ResolvedMix] = []
        self._originals: dict[tuple[nn.Module, str], Tensor] = {}
        self._notes: dict[tuple[nn.Module, str], Written] = {}

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that are merged."""
        return list(dict.fromkeys(name for mix in self._mixes for name in mix.mix.adapters))

    def without_merged(self, mix: Mix) -> Mix:
        """What is left of a mix to merge: as in PEFT, an adapter is merged once, and a warning says so.

        A weighted sum is left out where the same one was merged, and else merged whole.
        """
        if mix.weights is None:
            again = [name for name in mix.adapters if name in self.adapters]
        else:
            again = list(mix.adapters) if any(mix == merged.mix for merged in self._mixes) else []
        if not again:
            return mix
        warnings.warn(f"adapters {again} are merged already, and are not merged again", stacklevel=3)
        return Mix(tuple(name for name in mix.adapters if name not in again))

    def merge(self, mix: ResolvedMix) -> None:
        """Multiplies a mix into the weights and biases it acts on: W ← diag(s_out) W diag(s_in), b ← s_out ∘ b.

        Computed in float32 (float64 for float64 weights) from the original weights, with all that was merged before,
        and rounded once. Either all weights change or none.

        Raises:
            ValueError: a weight is quantised, offloaded, computed from others, over memory that another tensor has too
                or that its own elements share, not all that its layer computes by, or would overflow; or a vector or a
                weight is not finite.
            RuntimeError: as `check_unwritten`.
        """
        self.check_unwritten()
        merged = [*self._mixes, mix]
        try:
            self._write(merged)
        except BaseException:  # out of memory and Ctrl-C too: never half a merge
            self._write(self._mixes)
            raise
        self._mixes = merged

    def check_unwritten(self) -> None:
        """Sees to it that the originals belong to the model as it is now.

        Raises:
            RuntimeError: other code has written where the merge wrote. Its own numbers stand elsewhere in the model, to
                which the originals at these layers would make a model that nobody had.
        """
        modules = set(self._model.modules())
        paths = dict.fromkeys(written.path for written in self._notes.values() if not written.stands(modules))
        if paths:
            raise RuntimeError(
                f"the weights of {some(paths)} are not those that merge_adapter() wrote: other code has written or "
                "replaced them since (load_state_dict(), an optimizer's step, a resize), and with the weights of "
                "before the merge, or another merge into those, the model would be a mixture of both. Call "
                "merge_and_unload() without a name to keep what is there, without ia3rt; another time, "
                "unmerge_adapter() first, and then load or train"
            )

    def unmerge(self) -> None:
        """Puts the original weights back, bit for bit, into what stands in their places now.

        Raises:
            RuntimeError: as `check_unwritten`. Nothing has changed then.
        """
        self.check_unwritten()
        self._restore()

    def _restore(self) -> None:
        for (module, name), original in self._originals.items():
            _write_into((module._parameters if name in module._parameters else module._buffers)[name], original)

    def _write(self, mixes: Sequence[ResolvedMix]) -> None:
        self._restore()
        self._notes = {}
        scales: dict[SiteKey, Tensor] = {}
        sites: dict[str, Site] = {}
        for mix in mixes:
            for site, vector in composed_vectors(self._bank, mix).items():
                if not vector.isfinite().all():
                    raise ValueError(f"cannot merge {_not_finite(self._bank, mix)} at {site}")
                scales[site.key] = scales[site.key] * vector if site.key in scales else vector
                sites[site.path] = site
        memory = Memory(self._model)
        for site in sites.values():  # all before anything is written
            for holder, name in self._written(site, scales):
                self._check_here(site.path, holder)
                _check_alone(site.path, memory, holder, name)
                _check_writable(site.path, holder._parameters.get(name))
        for path, site in sites.items():
            if site.experts:
                self._write_experts(site, scales[site.key])
            else:
                self._write_layer(path, scales.get((path, "in")), scales.get((path, "out")))
        self._write_own(dict.fromkeys(adapter for mix in mixes for adapter in mix.adapters), self._replace)
        self._originals = {place: self._originals[place] for place in self._notes}  # others' were put back for good

    def _written(self, site: Site, scales: Mapping[SiteKey, Tensor]) -> Iterator[tuple[nn.Module, str]]:
        """The tensors that a merge at a site writes: what holds each, and its name there."""
        module = self._model.get_submodule(site.module)
        if site.experts:
            matrix = next(each for each in matrices_of(module) if each.name == site.parameter)
            holder, _, name = site.path.rpartition(".")
            yield self._model.get_submodule(holder), name
            if matrix.bias:
                yield module, matrix.bias
            return
        yield module, "weight"
        if (site.path, "out") in scales:
            yield module, "bias"

    def _write_layer(self, path: str, s_in: Tensor | None, s_out: Tensor | None) -> None:
        layer = self._model.get_submodule(path)
        has_channels = channel_widths(layer) is not None
        if has_channels:
            weight, bias = channel_weight(path, layer)
        else:
            weight, bias = mergeable_weight(path, layer, s_in, s_out)  # [out, in], maybe a view of the parameter
        dtype = torch.promote_types(weight.dtype, torch.float32)
        merged = weight.detach().to(dtype)
        if has_channels:
            merged = scaled_channels(layer, merged, s_in, s_out)
        else:
            merged = merged if s_in is None else merged * s_in
            merged = merged if s_out is None else merged * s_out.unsqueeze(1)
        self._replace(path, layer.weight, merged if weight is layer.weight else merged.t())
        if bias is not None and s_out is not None:
            self._replace(path, bias, bias.detach().to(dtype) * s_out)

    def _write_experts(self, site: Site, scale: Tensor) -> None:
        experts = self._model.get_submodule(site.module)
        matrix = next(each for each in matrices_of(experts) if each.name == site.parameter)
        holder, _, name = site.path.rpartition(".")
        weight = self._model.get_submodule(holder).get_parameter(name)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shape = [site.experts, 1, 1]
        shape[matrix.dim] = -1
        merged = weight.detach().to(dtype).view(matrix.shape) * scale.view(shape)
        self._replace(holder, weight, merged.view(weight.shape))
        if matrix.bias:
            bias = experts.get_parameter(matrix.bias)
            self._replace(site.module, bias, bias.detach().to(dtype) * scale.view(bias.shape))

    def _check_here(self, path: str, holder: nn.Module) -> None:
        """Raises ValueError where the weight that `holder` keeps is not all of it in this process."""
        if execution_device(holder) is not None:
            raise ValueError(
                f"cannot merge into {path!r}: accelerate offloads its weight; load the model without offloading"
            )
        if is_split(holder):
            raise ValueError(
                f"cannot merge into {path!r}: its weight is split over processes; merge into the model before it is"
            )

    def _replace(self, path: str, parameter: Any, value: Tensor) -> None:
        """Writes `value` into a parameter, at its address, and remembers what was there at first."""
        rounded = value.to(parameter.dtype)
        if not rounded.isfinite().all():
            if not parameter.isfinite().all():
                raise ValueError(f"cannot merge into {path!r}: its own weight or bias holds a NaN or inf")
            raise ValueError(f"merging overflows {parameter.dtype} in {path!r}: export the model in a wider dtype")
        _check_writable(path, parameter)  # again for sites' tensors, but for the first time for those of own modules
        place = self._place(path, parameter)
        if place not in self._originals:
            self._originals[place] = parameter.detach().clone().cpu()
        _write_into(parameter, rounded)
        self._notes[place] = Written(path, *place)

    def _place(self, path: str, tensor: Tensor) -> tuple[nn.Module, str]:
        for module in self._model.get_submodule(path).modules():
            for name, held in (*module._parameters.items(), *module._buffers.items()):
                if held is tensor:
                    return module, name
        raise AssertionError(f"{path!r} does not hold the tensor that is written there")


def _write_into(tensor: Any, value: Tensor) -> None:
    """Writes at the tensor's address; one that was made in inference mode can be written in that mode only."""
    with torch.no_grad(), torch.inference_mode() if tensor.is_inference() else nullcontext():
        tensor.copy_(value)


def _check_alone(path: str, memory: Memory, holder: nn.Module, name: str) -> None:
    """Raises ValueError where a tensor that is to be written is another module's too, or lies over one of another's."""
    others = memory.others(holder, name)
    if others:
        owners = sorted({each.path if each.name == name else f"{each.path}.{each.name}" for each in others})
        raise ValueError(
            f"cannot merge into {path!r}: it shares its {name} with {owners}, which would be scaled too: give each "
            "memory of its own first (nn.Parameter(tensor.clone()))"
        )


def _check_writable(path: str, tensor: Tensor | None) -> None:
    """Raises ValueError where a tensor cannot hold a number for each of its elements."""
    if tensor is not None and repeats(tensor):
        raise ValueError(
            f"cannot merge into {path!r}: elements of its tensor {tuple(tensor.shape)} are one place in memory, as "
            "expand() makes them: give it memory for each first (nn.Parameter(tensor.clone()))"
        )


def _not_finite(bank: Bank, mix: ResolvedMix) -> str:
    """Which adapter of a mix is to blame for a composed vector that is not finite, in words."""
    for adapter in mix.adapters:
        if not all(vector.isfinite().all() for vector in bank.vectors(adapter).values()):
            return f"adapter {adapter.name!r}, which has become NaN or inf in training,"
    return f"{mix.mix}, which overflows float32"
