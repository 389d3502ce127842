"""Finds the places of a model where an IA³ vector can act, by structure instead of by model name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

from ia3rt.adapters.site import ModuleNames, Side, Site, name_matches
from ia3rt.modules.channels import channel_widths, spatial_dims
from ia3rt.modules.quantised import is_gptq
from ia3rt.modules.readers import reader_of
from ia3rt.modules.set_forward import keeps_class_forward
from ia3rt.modules.sharding import is_tensor_parallel
from ia3rt.modules.wearer import original_class

# Siblings by which a layer's role is known, and which of them wear a vector. The second MLP matrix is scaled at
# its input, the key and value projections (or the projection that fuses them with the query) at their output.
_OUTPUT_SITES: tuple[tuple[frozenset[str], frozenset[str]], ...] = (
    (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"k_proj", "v_proj"})),
    (frozenset({"qkv_proj", "o_proj"}), frozenset({"qkv_proj"})),
    (frozenset({"c_attn", "c_proj"}), frozenset({"c_attn"})),
    (frozenset({"query_key_value", "dense"}), frozenset({"query_key_value"})),
    (frozenset({"q", "k", "v", "o"}), frozenset({"k", "v"})),
)
_INPUT_SITES: tuple[tuple[frozenset[str], frozenset[str]], ...] = (
    (frozenset({"up_proj", "down_proj"}), frozenset({"down_proj"})),
    (frozenset({"gate_up_proj", "down_proj"}), frozenset({"down_proj"})),
    (frozenset({"c_fc", "c_proj"}), frozenset({"c_proj"})),
    (frozenset({"dense_h_to_4h", "dense_4h_to_h"}), frozenset({"dense_4h_to_h"})),
    (frozenset({"fc1", "fc2"}), frozenset({"fc2"})),
    (frozenset({"wi", "wo"}), frozenset({"wo"})),
    (frozenset({"wi_0", "wi_1", "wo"}), frozenset({"wo"})),
)


def module_widths(module: nn.Module) -> tuple[int, int] | None:
    """The lengths (in, out) of the vectors that `module` can wear, or None where it can wear none."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None  # nn.MultiheadAttention reads its weight and never calls its forward
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if original_class(type(module)).__name__ == "Conv1D" and hasattr(module, "nf"):
        in_features, out_features = module.get_parameter("weight").shape  # transformers' Conv1D keeps W transposed
        return in_features, out_features
    if is_gptq(module):
        return module.in_features, module.out_features  # type: ignore[return-value]
    return None


class Targets(NamedTuple):
    """Which modules of a model may wear vectors, as its user said: the arguments of `find_sites`."""

    target_modules: ModuleNames | None = None
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
        if feedforward is not None and name_matches(site.path, feedforward) != (site.side == "in"):
            raise ValueError(
                f"module {site.path!r} wears its vector at the {'out' if site.side == 'in' else 'in'}put by patch()'s "
                f"feedforward_modules, {brings}: without feedforward_modules each adapter says it for itself"
            )


def find_sites(
    model: nn.Module,
    target_modules: ModuleNames | None = None,
    feedforward_modules: ModuleNames | None = None,
    exclude_modules: ModuleNames | None = None,
) -> list[Site]:
    """The sites of `model`, in the order of its modules.

    Args:
        model: any module tree.
        target_modules: modules that wear a vector, as in PEFT's IA3Config: a list or set of names, a regular
            expression, or "all-linear" (all but the output embedding). None finds the key and value projections and
            the second MLP matrix of each decoder layer by structure, or nothing: adapters say where they act.
        feedforward_modules: which of them wear it at the input. None means those that are a second MLP matrix by
            structure. Where one of the two is a regular expression, it may match more than `target_modules`.
        exclude_modules: modules left out, whatever else matches.

    Raises:
        ValueError: nothing matches `target_modules`, all is excluded, `feedforward_modules` reaches outside
            `target_modules`, or a module named is of a type that wears no vector.
    """
    modules = dict(model.named_modules())
    structural = dict(_structural_sites(model, modules))
    if target_modules is None:
        if feedforward_modules is not None:
            raise ValueError("feedforward_modules needs target_modules: it says which of them wear the input vector")
        sides: dict[str, Side] = structural
    else:
        paths = _named(model, modules, target_modules)
        if feedforward_modules is None:
            sides = {path: structural.get(path, "out") for path in paths}
        else:
            sides = {path: "in" if name_matches(path, feedforward_modules) else "out" for path in paths}
            if not isinstance(feedforward_modules, str) and not isinstance(target_modules, str):  # as PEFT does
                _check_feedforward(feedforward_modules, modules, sides)
    sites = []
    for path, side in sides.items():
        if exclude_modules is None or not name_matches(path, exclude_modules):
            sites.append(site_of(modules, path, side))
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
    if path not in modules:
        raise ValueError(
            f"the model has no module {path!r}: the adapter was made for another model, or for a part of this one"
        )
    widths = module_widths(modules[path]) or channel_widths(modules[path])
    if widths is None:
        kind = original_class(type(modules[path])).__name__
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
        raise ValueError(
            f"module {path!r} is tensor-parallel: each process computes with a part of its weight, and ia3rt does not "
            "split vectors so yet. Load the model without tp_plan; FSDP (fully_shard) splits weights and can be used"
        )
    if not keeps_class_forward(modules[path]):
        raise ValueError(f"module {path!r} has a forward of its own, set by other code, which would hide its vectors")
    return Site(path, side, width, spatial_dims(modules[path]))


def _named(model: nn.Module, modules: Mapping[str, nn.Module], names: ModuleNames) -> list[str]:
    if names == "all-linear":
        head = _asked(model, "get_output_embeddings")
        linear = [path for path, module in modules.items() if module_widths(module) and module is not head]
        return [path for path in linear if reader_of(modules, path) is None]
    return [path for path in modules if path and name_matches(path, names)]


def _check_feedforward(names: ModuleNames, modules: Mapping[str, nn.Module], sides: Mapping[str, Side]) -> None:
    outside = [path for path in modules if path and name_matches(path, names) and path not in sides]
    if outside:
        raise ValueError(f"feedforward_modules matches {outside[0]!r}, which target_modules does not: add it there")


def _linear_names(modules: Mapping[str, nn.Module]) -> str:
    names = sorted({path.rpartition(".")[2] for path, module in modules.items() if module_widths(module)})
    return ", ".join(names) if names else "(there are none)"


def _structural_sites(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Side]]:
    root = _decoder_path(model, modules)
    for parent, module in modules.items():
        if not (parent == root or root == "" or parent.startswith(f"{root}.")):
            continue
        children = {name for name, child in module.named_children() if module_widths(child)}
        chosen: dict[str, Side] = {}
        sided: tuple[tuple[Side, tuple[tuple[frozenset[str], frozenset[str]], ...]], ...] = (
            ("out", _OUTPUT_SITES),
            ("in", _INPUT_SITES),
        )
        for side, table in sided:
            for siblings, wearers in table:
                if siblings <= children:
                    chosen.update(dict.fromkeys(wearers, side))
        for name, _ in module.named_children():
            path = f"{parent}.{name}" if parent else name
            if name in chosen and reader_of(modules, path) is None:
                yield path, chosen[name]


def _decoder_path(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    """The part of the model to search: the text decoder, so that a vision or audio tower stays as it is."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return ""
    decoder = _asked(model, "get_decoder")
    return next((path for path, module in modules.items() if module is decoder), "")


def _asked(model: nn.Module, method: str) -> object:
    """What a transformers model answers, None for any other."""
    ask = getattr(model, method, None)
    return ask() if callable(ask) else None
