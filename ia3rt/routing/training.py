"""Adapters in training: their vectors are parameters of the model, in float32 whatever the bank's dtype is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ia3rt.adapters.adapter import Adapter
from ia3rt.adapters.bank import Bank
from ia3rt.adapters.resolved import ResolvedMix
from ia3rt.adapters.site import Site
from ia3rt.routing.averaging import Averaging, is_flattened, mesh_of
from ia3rt.routing.route import Backend, Route
from ia3rt.routing.tables import MixTables, pack_mixes, used_rows
from ia3rt.routing.traced import is_transformed
from ia3rt.routing.trained_parameters import make_plain, unregistered
from ia3rt.routing.worn import Worn


def check_names(model: nn.Module, adapters: Iterable[Adapter]) -> None:
    """Raises ValueError where the model has something already by the name of a parameter of these adapters."""
    seen = set()
    for adapter in adapters:
        for site in adapter.sites:
            module, name = model.get_submodule(site.module), _attribute(site, adapter)
            if (module, name) in seen or hasattr(module, name):
                raise ValueError(
                    f"adapter {adapter.name!r} cannot be trained: {site.path!r} has a {name!r} already; give the "
                    "adapter another name"
                )
            seen.add((module, name))


class TrainedAdapters:
    """The adapters of one model that are trained, while all else in it is frozen.

    A parameter is registered at the module where it acts, so that optimizers, `Trainer` and checkpoints find it. A
    forward reads what is registered then, so what a checkpoint put there is worn too. The bank's rows are written when
    somebody reads them (`sync`).

    Attributes:
        adapters: which are trained.
    """

    def __init__(self, model: nn.Module, bank: Bank, adapters: Iterable[Adapter]) -> None:
        self.adapters = frozenset(adapters)
        self._bank = bank
        self._modules = dict(model.named_modules())
        self._parameters: dict[Adapter, dict[Site, nn.Parameter]] = {}
        self._float32: dict[nn.Parameter, Tensor] = {}
        devices = bank.devices.items()
        self._columns = {site: site.slices.inside(device) for site, device in devices if site.slices is not None}
        self._frozen: list[tuple[nn.Module, str]] = []
        for module in self._modules.values():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self._frozen.append((module, name))
        for adapter in sorted(self.adapters, key=lambda adapter: adapter.row):
            vectors = {
                site: vector.float().clone() if site.slices is None else vector.float()[self._columns[site]]
                for site, vector in bank.distinct(adapter).items()
            }
            self._parameters[adapter] = {site: nn.Parameter(vector) for site, vector in vectors.items()}
            for site, parameter in self._parameters[adapter].items():
                self._modules[site.module].register_parameter(_attribute(site, adapter), parameter)
        mesh = mesh_of(model)
        self._averaging = None if mesh is None else Averaging(mesh)
        self.keep_float32()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The vectors, float32 [width] each; [width_of_one] where experts share one; of a site with slices, their
        columns, in order.
        """
        return [parameter for by_site in self._parameters.values() for parameter in by_site.values()]

    def are_worn(self, mixes: Iterable[ResolvedMix]) -> bool:
        """Whether a gradient of these mixes reaches a trained vector."""
        return any(not self.adapters.isdisjoint(mix.adapters) for mix in mixes)

    def worn(self, route: Route, backend: Backend) -> Worn:
        """What `route` is, as the parameters are now; gradients of it reach them."""
        used, mixes = used_rows(route.mixes)
        by_row = route.of_rows
        scales = TrainedScales(self._vectors(used), mixes, by_row, keeps=route.by_token)
        placed = tuple(MixTables() for _ in self._bank.tables)
        if backend == "triton":
            packed = pack_mixes(mixes, max(1, *(len(mix.rows) for mix in mixes)))
            index = torch.zeros(1, dtype=torch.int32, device="cpu") if by_row is None else by_row.int()
            vectors, devices = Stacked(scales.vectors), [here.device for here in self._bank.tables]
            placed = tuple(MixTables.over(vectors, packed.to(device), index.to(device)) for device in devices)
        return Worn(route, None if route.index is None else len(route.index), scales, placed)

    def is_replaced(self) -> bool:
        """Whether other code registered something in the place of a parameter, as a forward begins.

        Raises:
            RuntimeError: FullyShardedDataParallel was put around a part of the model since, or around all of it and the
                forward is none of its own: gradients are not those that an optimizer reads.
        """
        is_replaced = False
        for adapter, site, module in self._places():
            registered = module._parameters.get(_attribute(site, adapter))
            if isinstance(registered, nn.Parameter) and is_flattened(registered):
                raise RuntimeError(
                    f"adapter {adapter.name!r} is trained, and its vector at {site} was given to "
                    "FullyShardedDataParallel (FSDP1) after train_adapter(): a forward reads all vectors as it begins, "
                    "before a part of the model has its own, so that their gradients would not be averaged. Load the "
                    "model anew, and call fully_shard (FSDP2) before train_adapter(), or DistributedDataParallel"
                )
            is_replaced |= registered is not self._parameters[adapter][site]
        return is_replaced

    def adopt(self) -> None:
        """Takes parameters that other code registered in the place of these, as a checkpoint does.

        Tensors that are none, as torch.func.functional_call puts there for one call, are worn by what is laid then.

        Raises:
            RuntimeError: one is no parameter any more, or split over processes.
        """
        self._check_registered()
        if is_transformed():
            return
        for adapter, site, module in self._places():
            standing = self._standing(adapter, site, module)
            if type(standing) is nn.Parameter:
                self._parameters[adapter][site] = standing
            elif hasattr(standing, "device_mesh"):
                raise RuntimeError(
                    f"adapter {adapter.name!r} is trained, and its vector at {site} was split over processes after "
                    "train_adapter(): call end_training(), and train_adapter() once fully_shard() was called"
                )
        self.keep_float32()

    def keep_float32(self) -> None:
        """Gives the parameters their float32 numbers back after the model was cast, and follows it to its devices."""
        if self._averaging is not None:
            self._averaging.watch(self.parameters)
        devices, kept = self._bank.devices, {}
        by_site = [(site, each) for held in self._parameters.values() for site, each in held.items()]
        for site, parameter in by_site:
            own = self._float32.get(parameter)
            if own is None or parameter.dtype == torch.float32:
                own = parameter.data
            kept[parameter] = own = own.to(devices[site], torch.float32)
            if parameter.data_ptr() != own.data_ptr() or parameter.dtype != own.dtype:
                parameter.data = own
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.to(own.device, own.dtype)
        self._float32 = kept

    def sync(self) -> None:
        """Writes the parameters into the bank's rows, rounded to its dtype.

        Raises:
            RuntimeError: one is no parameter any more, or FullyShardedDataParallel has split them over processes.
                Nothing has changed then.
        """
        self._check_registered()
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        for adapter in self.adapters:
            for site, row in self._bank.vectors(adapter).items():
                trained = self._standing(adapter, site, self._modules[site.module])
                learned = _repeated(trained, site)
                if is_flattened(trained) and len(learned) != len(self._columns.get(site, row)):
                    raise RuntimeError(
                        f"adapter {adapter.name!r} is trained, and FullyShardedDataParallel has split its vector at "
                        f"{site} over processes: call this within FullyShardedDataParallel.summon_full_params(model)"
                    )
                if site.slices is None:
                    row.copy_(learned)
                else:
                    row[self._columns[site]] = learned.to(row.dtype)

    def make_plain(self) -> None:
        """Makes parameters again of what other code computes in their places."""
        for adapter, site, module in self._places():
            make_plain(module, _attribute(site, adapter))

    def end(self) -> None:
        """Writes the bank, unregisters the parameters, and gives the model's own their `requires_grad` back."""
        self._write()
        for adapter, site, module in self._places():
            module._parameters.pop(_attribute(site, adapter), None)
        for module, name in self._frozen:  # what stands there now: a checkpoint may have put others there
            parameter = module._parameters.get(name)
            if parameter is not None and parameter.is_floating_point():
                parameter.requires_grad_(True)

    def _places(self) -> Iterator[tuple[Adapter, Site, nn.Module]]:
        for adapter, by_site in self._parameters.items():
            for site in by_site:
                yield adapter, site, self._modules[site.module]

    def _standing(self, adapter: Adapter, site: Site, module: nn.Module) -> Tensor:
        """What the model has for a vector now: what was registered, where nothing is."""
        standing = module._parameters.get(_attribute(site, adapter))
        return self._parameters[adapter][site] if standing is None else standing

    def _check_registered(self) -> None:
        for adapter, site, module in self._places():
            if module._parameters.get(_attribute(site, adapter)) is None:
                raise unregistered(_attribute(site, adapter), adapter.name, str(site))

    def _vectors(self, used: Sequence[int]) -> list[list[_Vector]]:
        """By site, the vectors of these rows of the bank: parameters, or copies, which no later load changes."""
        trained: dict[int, dict[Site, Tensor]] = {adapter.row: {} for adapter in self._parameters}
        for adapter, site, module in self._places():
            trained[adapter.row][site] = self._standing(adapter, site, module)
        frozen = {
            row: self._bank.by_site(lambda on: torch.split(on.table[row].float().clone(), on.widths))  # noqa: B023
            for row in used
        }
        vectors: list[list[_Vector]] = []
        for position, (site, device) in enumerate(self._bank.devices.items()):
            if site in self._columns:
                self._columns[site] = self._columns[site].to(device)
            here = [(trained.get(row, {}).get(site), frozen[row][position]) for row in used]
            vectors.append([row if own is None else self._whole(site, own, row) for own, row in here])
        return vectors

    def _whole(self, site: Site, own: Tensor, row: Tensor) -> _Vector:
        """The vector of a whole site, of which a parameter may be a part: laid when it is worn, as that changes."""
        if site in self._columns:
            return _Part(own, row, self._columns[site])
        return _Shared(own, site) if _is_shared(own, site) else own


class _Part(NamedTuple):
    """A site's trained columns, and its whole vector, which is ones elsewhere."""

    trained: Tensor
    row: Tensor
    columns: Tensor

    def laid(self) -> Tensor:
        return self.row.to(self.trained.dtype).index_copy(0, self.columns, self.trained)


class _Shared(NamedTuple):
    """A vector that all experts of a site share."""

    trained: Tensor
    site: Site

    def laid(self) -> Tensor:
        return _repeated(self.trained, self.site)


_Vector: TypeAlias = "Tensor | _Part | _Shared"
"""Of one row at one site; what is no Tensor is laid where it is worn."""


def _laid(vector: _Vector) -> Tensor:
    return vector if isinstance(vector, Tensor) else vector.laid()


class TrainedScales:
    """Mixes of parameters, combined where they are worn: each part of a model that a checkpoint runs again has its own.

    Args:
        vectors: by site, one [width] for each row that `mixes` name, or a part of it that is laid where it is worn.
        mixes: the distinct mixes.
        index: int64 [rows], the mix of each row; None where all wear the first.
        keeps: whether a scale has a row a mix instead, as routes by token look up.
    """

    is_written = True

    def __init__(
        self, vectors: list[list[_Vector]], mixes: Sequence[ResolvedMix], index: Tensor | None, keeps: bool
    ) -> None:
        self.vectors = vectors
        self._mixes = [(mix.rows, mix.weights) for mix in mixes]
        devices = dict.fromkeys((each if isinstance(each, Tensor) else each.trained).device for each, *_ in vectors)
        self._index = index
        self._indices = {} if index is None else {device: index.to(device) for device in devices}
        self._keeps = keeps

    def scale(self, position: int) -> Tensor:
        """As `Scales.scale`."""
        if position >= len(self.vectors):
            return _laid(self.vectors[0][0]).new_ones(())  # the model got it since: none of these mixes acts there
        vectors = list(map(_laid, self.vectors[position]))
        mixed = [_mixed(vectors, rows, weights) for rows, weights in self._mixes]
        if (self._index is None and not self._keeps) or len(self._index if self._index is not None else mixed) == 1:
            return mixed[0]
        stacked = torch.stack(mixed)
        return stacked if self._index is None else stacked[self._indices[stacked.device]]


class Stacked(Sequence[Tensor]):
    """By site, the vectors as a bank that the kernels read, [rows, width]; stacked where they are worn."""

    def __init__(self, vectors: list[list[_Vector]]) -> None:
        self._vectors = vectors

    def __len__(self) -> int:
        """How many sites there are."""
        return len(self._vectors)

    def __getitem__(self, position):  # type: ignore[no-untyped-def]
        """A site's rows; gradients of them reach the vectors."""
        return torch.stack(list(map(_laid, self._vectors[position])))


def _mixed(vectors: Sequence[Tensor], rows: Sequence[int], weights: Sequence[float] | None) -> Tensor:
    """Π l_j, or Σ w_j l_j, from left to right as everywhere."""
    if not rows:
        return torch.ones_like(vectors[0])
    mixed = vectors[rows[0]] if weights is None else vectors[rows[0]] * weights[0]
    for place, row in enumerate(rows[1:], 1):
        mixed = mixed * vectors[row] if weights is None else mixed + vectors[row] * weights[place]
    return mixed


def _repeated(vector: Tensor, site: Site) -> Tensor:
    """The vector of a whole site, where experts may share one."""
    return vector.repeat(site.experts) if _is_shared(vector, site) else vector


def _is_shared(vector: Tensor, site: Site) -> bool:
    return bool(site.experts) and len(vector) == site.width_of_one


def _attribute(site: Site, adapter: Adapter) -> str:
    """The parameter's name in its module; names of parameters have no dots."""
    return f"ia3_{site.side}_{adapter.name.replace('.', '_')}"
