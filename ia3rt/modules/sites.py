"""Finds the places of a model where an IA³ vector can act, by structure instead of by model name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from ia3rt.adapters.site import ModuleNames, Side, Site, SlicedNames, check_names, name_matches
from ia3rt.modules.channels import channel_widths, spatial_dims
from ia3rt.modules.experts import why_unworn
from ia3rt.modules.experts_forms import Matrix, expert_sites, matrices_of, matrix_at
from ia3rt.modules.quantised import is_gptq
from ia3rt.modules.readers import reader_of
from ia3rt.modules.searched import asked, searched_paths
from ia3rt.modules.set_forward import keeps_class_forward
from ia3rt.modules.sharding import is_tensor_parallel
from ia3rt.modules.siblings import sides_within
from ia3rt.modules.slices import find_slices
from ia3rt.modules.split import why_unworn as why_unworn_split
from ia3rt.modules.tried import unfit_result
from ia3rt.modules.wearer import original_class


def module_widths(module: nn.Module) -> tuple[int, int] | None:
    """The lengths (in, out) of the vectors that `module` can wear, or None where it can wear none."""
    if isinstance(module, nn.Linear):
        return (module.in_features, module.out_features) if unfit_result(module) is None else None
    if original_class(type(module)).__name__ == "Conv1D" and hasattr(module, "nf"):
        in_features, out_features = module.get_parameter("weight").shape  # transformers' Conv1D keeps W transposed
        return in_features, out_features
    if is_gptq(module):
        return module.in_features, module.out_features  # type: ignore[return-value]
    return None


class Targets(NamedTuple):
    """Which modules of a model may wear vectors, as its user said: the arguments of `find_sites`."""

    target_modules: ModuleNames | SlicedNames | None = None
    feedforward_modules: ModuleNames | None = None
    exclude_modules: ModuleNames | None = None

    def check(self, model: nn.Module, site: Site, adapter: str) -> None:
        """Raises ValueError where an adapter brings a site to `model` that its user left out."""
        target, feedforward, excluded = self
        brings = f"and adapter {adapter!r} has a vector for its {site.side}put (width {site.width})"
        if excluded is not None and name_matches(site.path, excluded):
            raise ValueError(f"patch() was told to exclude module {site.path!r}, {brings}")
        if target is not None and site.path not in _named(model, dict(model.named_modules()), target):
            raise ValueError(
                f"patch(target_modules={target!r}) leaves module {site.path!r} out, {brings}: add it there"
            )
        if target is not None and site.side == "in" and _slices_of(site.path, target):
            raise ValueError(
                f"patch(target_modules={target!r}) lets module {site.path!r} wear a vector at slices of its output "
                f"only, {brings}: give None for its slices"
            )
        if feedforward is not None and name_matches(site.path, feedforward) != (site.side == "in"):
            raise ValueError(
                f"module {site.path!r} wears its vector at the {'out' if site.side == 'in' else 'in'}put by patch()'s "
                f"feedforward_modules, {brings}: without feedforward_modules each adapter says it for itself"
            )


def find_sites(
    model: nn.Module,
    target_modules: ModuleNames | SlicedNames | None = None,
    feedforward_modules: ModuleNames | None = None,
    exclude_modules: ModuleNames | None = None,
) -> list[Site]:
    """The sites of `model`, in the order of its modules.

    Args:
        model: any module tree.
        target_modules: modules that wear a vector, as in PEFT's IA3Config: a list or set of names, a regular
            expression, or "all-linear" (all but the output embedding). None finds the key and value projections and
            the second MLP matrix of each layer by structure, or nothing: adapters say where they act. Those of the text
            decoder, where the model writes text after what it sees or hears; of the whole model else. In a mapping each
            name says which slices of the output wear it: some of q, k and v, or of gate and up.
        feedforward_modules: which of them wear it at the input. None means those that are a second MLP matrix by
            structure. Where one of the two is a regular expression, it may match more than `target_modules`.
        exclude_modules: modules left out, whatever else matches.

    Raises:
        ValueError: nothing matches `target_modules`, all is excluded, `feedforward_modules` reaches outside
            `target_modules`, or a module named is of a type that wears no vector; or slices as in `find_slices`.
    """
    arguments = dict(target_modules=target_modules, feedforward_modules=feedforward_modules)
    for argument, names in {**arguments, "exclude_modules": exclude_modules}.items():
        check_names(argument, names)
    modules = dict(model.named_modules())
    structural = _structural_sites(model, modules)
    if target_modules is None or target_modules == "all-linear":
        _tell_of_experts(
            searched_paths(model, modules) if target_modules is None else modules, modules, exclude_modules
        )
    if target_modules is None:
        if feedforward_modules is not None:
            raise ValueError("feedforward_modules needs target_modules: it says which of them wear the input vector")
        sides: dict[str, Side] = structural
    else:
        paths = _named(model, modules, target_modules)
        _check_names_of_experts(target_modules, modules)
        if feedforward_modules is None:
            known = structural | {path: site.side for path, site in expert_sites(modules).items()}
            sides = {path: known.get(path, "out") for path in paths}
        else:
            sides = {path: "in" if name_matches(path, feedforward_modules) else "out" for path in paths}
            if not isinstance(feedforward_modules, str) and not isinstance(target_modules, str):  # as PEFT does
                _check_feedforward(feedforward_modules, modules, sides)
    sites = []
    for path, side in sides.items():
        if exclude_modules is None or not name_matches(path, exclude_modules):
            sites.append(site_of(modules, path, side))
    if isinstance(target_modules, Mapping):
        sites = _sliced(model, modules, sites, target_modules)
    if not sites and (sides or target_modules is not None):
        asked = f"exclude_modules={exclude_modules!r}" if sides else f"target_modules={target_modules!r}"
        raise ValueError(
            f"no IA³ site found in {type(model).__name__} with {asked}; name the modules in target_modules, as in "
            f"PEFT: its linear modules are called {_linear_names(modules)}"
        )
    return sites


def shared_modules(model: nn.Module) -> dict[str, list[str]]:
    """The paths of modules that stand in several places, each with all of its module's.

    A part of a shared module stands in one place, as PEFT sees it too: it is replaced within that.
    """
    places: dict[nn.Module, list[str]] = {}
    for parent, module in model.named_modules():
        for name, child in module._modules.items():
            if child is not None:
                places.setdefault(child, []).append(f"{parent}.{name}" if parent else name)
    return {path: paths for paths in places.values() if len(paths) > 1 for path in paths}


def site_of(modules: Mapping[str, nn.Module], path: str, side: Side) -> Site:
    """The site at `path` and `side`.

    Raises:
        ValueError: the model lacks the module, or its type wears no vector.
    """
    at_experts = None if path in modules else matrix_at(modules, path)
    if at_experts is not None:
        return _site_at_experts(modules, *at_experts, side)
    if path not in modules:
        parent, _, name = path.rpartition(".")
        if parent in modules and name in modules[parent]._parameters:
            kind = original_class(type(modules[parent])).__name__
            raise ValueError(f"{path!r} is a tensor of a {kind}, which wears no vector: how that computes is not known")
        raise ValueError(
            f"the model has no module {path!r}: the adapter was made for another model, or for a part of this one"
        )
    if any(is_lazy(each) for each in modules[path].parameters(False)):
        kind = original_class(type(modules[path])).__name__
        raise ValueError(
            f"module {path!r} is a {kind}, which has no weights yet: run a forward of the model once before patch()"
        )
    widths = module_widths(modules[path]) or channel_widths(modules[path])
    if widths is None:
        kind = original_class(type(modules[path])).__name__
        if isinstance(modules[path], nn.Linear):
            raise ValueError(
                f"module {path!r} is a {kind}, which wears no vector: its forward gives {unfit_result(modules[path])}, "
                f"and a vector scales one tensor, of its out_features ({modules[path].out_features})"
            )
        raise ValueError(
            f"module {path!r} is a {kind}, which wears no vector: only nn.Linear, transformers' Conv1D, GPTQ's "
            "layers, convolutions and embeddings do"
        )
    width = widths[0 if side == "in" else 1]
    if width is None:
        raise ValueError(f"module {path!r} is an embedding, whose input are indices: it wears a vector at its output")
    reader = reader_of(modules, path)
    if reader is not None:
        name = type(reader).__name__
        raise ValueError(f"module {path!r} cannot wear a vector: {name} reads its weight and never calls it")
    if is_tensor_parallel(modules, path):
        why = why_unworn_split(modules[path], side)
        if why is not None:
            raise ValueError(
                f"module {path!r} is tensor-parallel and wears no vector at its {side}put: {why}. Leave it out, or "
                "load the model without tp_plan; FSDP (fully_shard) splits weights of any layer"
            )
    if not keeps_class_forward(modules[path]):
        raise ValueError(f"module {path!r} has a forward of its own, set by other code, which would hide its vectors")
    return Site(path, side, width, spatial=spatial_dims(modules[path]))


def _tell_of_experts(
    paths: Iterable[str], modules: Mapping[str, nn.Module], exclude_modules: ModuleNames | None
) -> None:
    """Warns of experts that would be sites, if they did not compute by what has no place for a vector."""
    left: dict[str, list[str]] = {}
    for path in paths:
        sites = [matrix.site(path).path for matrix in matrices_of(modules[path])]
        wanted = [each for each in sites if exclude_modules is None or not name_matches(each, exclude_modules)]
        why = why_unworn(modules, path) if wanted else None
        if why is not None:
            left.setdefault(f"{original_class(type(modules[path])).__name__} {why}", []).append(path)
    for why, experts in left.items():
        warnings.warn(
            f"patch() finds no sites in the experts {experts}: a {why}. What changes after patch() brings none",
            stacklevel=4,
        )


def _site_at_experts(modules: Mapping[str, nn.Module], parent: str, matrix: Matrix, side: Side) -> Site:
    site = matrix.site(parent)
    why = why_unworn(modules, parent)
    if why is not None:
        raise ValueError(f"{site.path!r} wears no vector: {original_class(type(modules[parent])).__name__} {why}")
    if side != matrix.side:
        raise ValueError(
            f"{site.path!r}, of all experts, wears vectors at its {matrix.side}put only, not at its {side}put"
        )
    return site


def _named(model: nn.Module, modules: Mapping[str, nn.Module], names: ModuleNames) -> list[str]:
    if names == "all-linear":
        head = asked(model, "get_output_embeddings")
        linear = [path for path, module in modules.items() if module_widths(module) and module is not head]
        at_experts = [path for path, site in expert_sites(modules).items() if why_unworn(modules, site.module) is None]
        return [*(path for path in linear if reader_of(modules, path) is None), *at_experts]
    return [path for path in (*modules, *expert_sites(modules)) if path and name_matches(path, names)]


def _check_names_of_experts(names: ModuleNames, modules: Mapping[str, nn.Module]) -> None:
    """Raises ValueError where one of several names means nothing in a mixture, as those of single experts do now."""
    sites = expert_sites(modules)
    if isinstance(names, str) or not sites:
        return
    nothing = [name for name in names if not any(name_matches(path, [name]) for path in (*modules, *sites))]
    if nothing:
        experts = sorted({".".join(path.split(".")[-2:]) for path in sites})
        raise ValueError(
            f"target_modules names {nothing}, which the model has not: all experts of a layer are one tensor a matrix "
            f"in it, {experts}. Name these, with a vector for each expert"
        )


def _sliced(model: nn.Module, modules: Mapping[str, nn.Module], sites: list[Site], names: SlicedNames) -> list[Site]:
    """The sites with the slices that `names` says."""
    wanted = {site.path: _slices_of(site.path, names) for site in sites}
    for site in sites:
        if wanted[site.path] is not None and site.experts:
            raise ValueError(
                f"{site.path!r}, of all experts, wears vectors of its whole width, and target_modules gives it "
                f"slices {wanted[site.path]}: give None for them. Ones in a vector leave a part as it is"
            )
        if wanted[site.path] and site.side == "in":
            raise ValueError(
                f"module {site.path!r} wears its vector at its input, and slices {wanted[site.path]} are of an output: "
                "give None for them, or name its side with feedforward_modules"
            )
        if wanted[site.path] and is_tensor_parallel(modules, site.path):
            raise ValueError(
                f"module {site.path!r} is tensor-parallel, and where its slices {wanted[site.path]} are is seen on a "
                "whole layer only: give None for them"
            )
    found = find_slices(model, modules, {path: slices for path, slices in wanted.items() if slices is not None})
    return [replace(site, slices=found.get(site.path)) for site in sites]


def _slices_of(path: str, names: ModuleNames | SlicedNames) -> tuple[str, ...] | None:
    """The slices that a mapping gives the module at `path`; None for the whole of it."""
    if not isinstance(names, Mapping):
        return None
    given = {name: slices for name, slices in names.items() if name_matches(path, [name])}
    sets = {
        None if slices is None else frozenset([slices] if isinstance(slices, str) else slices)
        for slices in given.values()
    }
    if len(sets) > 1:
        raise ValueError(f"target_modules gives module {path!r} other slices by one name than by another: {given}")
    (slices,) = sets or {None}
    return None if slices is None else tuple(sorted(slices))


def _check_feedforward(names: ModuleNames, modules: Mapping[str, nn.Module], sides: Mapping[str, Side]) -> None:
    paths = *modules, *expert_sites(modules)
    outside = [path for path in paths if path and name_matches(path, names) and path not in sides]
    if outside:
        raise ValueError(f"feedforward_modules matches {outside[0]!r}, which target_modules does not: add it there")


def _linear_names(modules: Mapping[str, nn.Module]) -> str:
    paths = *(path for path, module in modules.items() if module_widths(module)), *expert_sites(modules)
    names = sorted({path.rpartition(".")[2] for path in paths})
    return ", ".join(names) if names else "(there are none)"


def _structural_sites(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, Side]:
    """The sites known by their siblings, in the part of the model that is searched, in the order of the modules."""
    searched = dict.fromkeys(searched_paths(model, modules))
    found = sides_within(searched, {path for path, module in modules.items() if module_widths(module)})
    sites: dict[str, Side] = {}
    for path, module in modules.items():
        if path in found and reader_of(modules, path) is None:
            sites[path] = found[path]
        for matrix in matrices_of(module) if path in searched else ():
            if matrix.side == "in" and why_unworn(modules, path) is None:
                sites[matrix.site(path).path] = "in"
    return sites
