"""Describes an IA³ checkpoint: what is in it, how far it is from doing nothing, and which models it fits."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ia3rt.adapters.checkpoint import Checkpoint
from ia3rt.adapters.file_sites import finite
from ia3rt.adapters.site import Side, SiteKey

# What all module paths of a family's adapters look like, with layer numbers written as N. The first that fits wins,
# so the stricter ones stand before the ones that would fit their paths too.
_FAMILIES: tuple[tuple[str, str], ...] = (
    ("OPT decoder", r"(.+\.)?decoder\.layers\.N\.(self_attn\.\w+|fc1|fc2)"),
    (
        "BART-shaped encoder-decoder (BART, Whisper)",
        r"(.+\.)?(encoder|decoder)\.layers\.N\.((self|encoder)_attn\.\w+|fc1|fc2)",
    ),
    (
        "Llama-shaped decoder (Llama, Mistral, Qwen, Gemma, SmolLM)",
        r"(.+\.)?layers\.N\.(self_attn\.(q|k|v|o|qkv)_proj|mlp\.(gate|up|gate_up|down)_proj)",
    ),
    (
        "mixture-of-experts decoder (Mixtral, Qwen-MoE)",
        r"(.+\.)?layers\.N\.(self_attn\.\w+_proj|mlp\.\w+_proj|\w+\.(experts(\.N)?|shared_experts?)\.\w+)",
    ),
    ("Phi decoder", r"(.+\.)?layers\.N\.(self_attn\.(q_proj|k_proj|v_proj|dense)|mlp\.(fc1|fc2))"),
    ("GPT-NeoX decoder (Pythia)", r"(.+\.)?layers\.N\.(attention|mlp)\.(query_key_value|dense\w*)"),
    ("Falcon or Bloom decoder", r"(.+\.)?h\.N\.(self_attention|mlp)\.(query_key_value|dense\w*)"),
    ("GPT-2 decoder", r"(.+\.)?h\.N\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))"),
    ("T5 encoder-decoder", r"(.+\.)?(encoder|decoder)\.block\.N\.layer\.N\.\w+\.(q|k|v|o|wi|wi_0|wi_1|wo)"),
    ("BERT-shaped encoder (BERT, RoBERTa)", r"(.+\.)?encoder\.layer\.N\.(attention|intermediate|output)\..+"),
)
_KEY_VALUE = {"k_proj", "v_proj", "k", "v", "key", "value"}
_EMBEDDINGS = {"embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out"}
_FUSED = {"qkv_proj", "c_attn", "query_key_value"}
_ADAPTERHUB = (
    "all its vectors act at outputs and scale the bias too, in its forward as in ia3rt; only its merge_adapter() "
    "leaves the bias as it is"
)


@dataclass(frozen=True)
class Statistics:
    """How far vectors are from all ones, which do nothing.

    Attributes:
        mean_distance: mean |l - 1| of the finite numbers; 0 where there are none.
        max_distance: the largest |l - 1| of the finite numbers; 0 where there are none.
        negative: how many numbers are below 0.
        large: how many are finite and above 2.
        not_finite: how many are NaN or infinite.
    """

    mean_distance: float
    max_distance: float
    negative: int
    large: int
    not_finite: int


@dataclass(frozen=True)
class VectorGroup:
    """The vectors that act at one kind of place: the same module in every layer.

    Attributes:
        name: the module's path after its layer's number, such as `self_attn.k_proj`; all of it, with numbers as N,
            where several kinds of layer have such a module.
        side: `in` or `out`.
        width: the length of each vector.
        vectors: how many there are.
        statistics: over all their numbers.
    """

    name: str
    side: Side
    width: int
    vectors: int
    statistics: Statistics


@dataclass(frozen=True)
class Fit:
    """The kind of model that has modules of a checkpoint's names.

    Attributes:
        family: `unknown` where no known one has them all.
        layers: how many layers have a vector.
        key_value: the widths of the vectors for keys and values, ascending.
        fused: the widths of the vectors for projections that give queries, keys and values at once.
        mlp: the widths of the vectors at inputs, which are those of MLPs.
    """

    family: str
    layers: int
    key_value: tuple[int, ...]
    fused: tuple[int, ...]
    mlp: tuple[int, ...]


@dataclass(frozen=True)
class OwnModule:
    """A module that an adapter brings its own of.

    Attributes:
        path: the module's in the model.
        what: what it is, in words.
        tensors: the names and shapes of what it holds, such as `weight 3 × 32`.
        numbers: how many numbers it holds.
        bytes: what these take, as stored.
        not_finite: how many are NaN or infinite.
    """

    path: str
    what: str
    tensors: str
    numbers: int
    bytes: int
    not_finite: int


@dataclass(frozen=True)
class Description:
    """What `ia3rt inspect` says about a checkpoint.

    Attributes:
        groups: one for each module name, side and width, in the order of the layers' modules.
        statistics: over all vectors.
        vectors: how many there are.
        numbers: how many numbers they hold together.
        bytes: what these take, as stored.
        dtypes: the names of the stored dtypes, sorted.
        fit: which models the checkpoint fits.
        config: its adapter_config.json.
        modules: what it brings besides vectors, by path.
        written_by: the library whose format it has.
    """

    groups: tuple[VectorGroup, ...]
    statistics: Statistics
    vectors: int
    numbers: int
    bytes: int
    dtypes: tuple[str, ...]
    fit: Fit
    config: Mapping[str, Any]
    modules: tuple[OwnModule, ...]
    written_by: str

    @property
    def is_finite(self) -> bool:
        """Whether no number is NaN or infinite."""
        return self.statistics.not_finite == 0 and not any(module.not_finite for module in self.modules)


def describe(checkpoint: Checkpoint) -> Description:
    """Counts and measures the vectors of a checkpoint. It needs no model."""
    tensors = list(checkpoint.vectors.values())
    return Description(
        groups=_groups(checkpoint.vectors),
        statistics=_measure(tensors),
        vectors=len(tensors),
        numbers=sum(tensor.numel() for tensor in tensors),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        fit=find_fit(checkpoint.vectors),
        config=checkpoint.config,
        modules=tuple(_own_module(path, checkpoint) for path in sorted(checkpoint.modules)),
        written_by=checkpoint.written_by,
    )


def find_fit(vectors: Mapping[SiteKey, Tensor]) -> Fit:
    """Tells from module paths, sides and widths which kind of model the vectors were trained on."""
    patterns = {_numberless(path) for path, _ in vectors}
    families = (name for name, expression in _FAMILIES if all(re.fullmatch(expression, p) for p in patterns))
    outputs = [(path.rpartition(".")[2], vector) for (path, side), vector in vectors.items() if side == "out"]
    return Fit(
        family=next(families, "unknown"),
        layers=len({layer.group() for path, _ in vectors if (layer := re.match(r".*?\.\d+(?=\.)", path))}),
        key_value=_widths(vector for name, vector in outputs if name in _KEY_VALUE),
        fused=_widths(vector for name, vector in outputs if name in _FUSED),
        mlp=_widths(vector for (_, side), vector in vectors.items() if side == "in"),
    )


def render(description: Description, name: str) -> RenderableType:
    """The description as `ia3rt inspect` prints it.

    Args:
        description: what `describe` returned.
        name: what to call the checkpoint: its path, or its id on the Hub.
    """
    parts: list[RenderableType] = [_summary(description, name), Text(), _table(description)]
    if description.modules:
        parts += [Text(), _modules_table(description)]
    return Group(*parts)


def _own_module(path: str, checkpoint: Checkpoint) -> OwnModule:
    state = checkpoint.modules[path]
    if checkpoint.written_by == "AdapterHub":
        what = "the head that was saved with it"
    elif path not in checkpoint.unnamed:
        what = "its own, by modules_to_save"
    elif path.rpartition(".")[2] in _EMBEDDINGS:
        what = "saved embeddings"
    else:
        what = "not named by modules_to_save"
    return OwnModule(
        path=path,
        what=what,
        tensors=", ".join(f"{name} {' × '.join(f'{n:,}' for n in each.shape)}" for name, each in state.items()),
        numbers=sum(tensor.numel() for tensor in state.values()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
        not_finite=sum(int((~finite(tensor)).sum()) for tensor in state.values()),
    )


def _groups(vectors: Mapping[SiteKey, Tensor]) -> tuple[VectorGroup, ...]:
    names = _short_names({_numberless(path) for path, _ in vectors})
    grouped: dict[tuple[str, Side, int], list[Tensor]] = {}
    for path, side in sorted(vectors, key=_natural):
        vector = vectors[path, side]
        grouped.setdefault((names[_numberless(path)], side, vector.numel()), []).append(vector)
    return tuple(
        VectorGroup(name, side, width, len(members), _measure(members))
        for (name, side, width), members in grouped.items()
    )


def group_names(sites: Collection[SiteKey]) -> dict[SiteKey, str]:
    """For each site what its group is called: the module's path after its layer's number, and the side where both act.

    All that have one name are the same module in every layer.
    """
    names = _short_names({_numberless(path) for path, _ in sites})
    sides: dict[str, set[Side]] = {}
    for path, side in sites:
        sides.setdefault(names[_numberless(path)], set()).add(side)
    named = {key: names[_numberless(key[0])] for key in sorted(sites, key=_natural)}
    return {key: f"{name} ({key[1]})" if len(sides[name]) > 1 else name for key, name in named.items()}


def _natural(key: SiteKey) -> list[tuple[int, str]]:
    """Sorts paths with layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in (*key[0].split("."), key[1])]


def _numberless(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", path)


def _short_names(patterns: Collection[str]) -> dict[str, str]:
    short = {pattern: pattern.partition(".N.")[2] or pattern for pattern in patterns}
    taken = list(short.values())
    return {pattern: name if taken.count(name) == 1 else pattern for pattern, name in short.items()}


def _widths(vectors: Iterator[Tensor]) -> tuple[int, ...]:
    return tuple(sorted({vector.numel() for vector in vectors}))


def _measure(vectors: Collection[Tensor]) -> Statistics:
    numbers = torch.cat([vector.reshape(-1).double() for vector in vectors])
    finite = numbers[numbers.isfinite()]
    distance = (finite - 1).abs()
    return Statistics(
        mean_distance=distance.mean().item() if finite.numel() else 0.0,
        max_distance=distance.max().item() if finite.numel() else 0.0,
        negative=int((finite < 0).sum()),
        large=int((finite > 2).sum()),
        not_finite=numbers.numel() - finite.numel(),
    )


def _summary(description: Description, name: str) -> Table:
    config, fit = description.config, description.fit
    counts = f"{description.vectors} vectors, {description.numbers:,} numbers, {description.bytes:,} bytes"
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("checkpoint", Text(name))
    grid.add_row("base model", Text(str(config.get("base_model_name_or_path") or "not said")))
    grid.add_row("task type", Text(str(config.get("task_type") or "not said")))
    grid.add_row("fits", Text(fit.family))
    grid.add_row("", Text(", ".join(_sizes(fit))))
    grid.add_row("holds", Text(f"{counts}, {' and '.join(description.dtypes)}"))
    if description.modules:
        grid.add_row("", Text(f"and its own {', '.join(module.path for module in description.modules)}"))
    if description.written_by != "PEFT":
        grid.add_row("format", Text(f"{description.written_by}'s; {_ADAPTERHUB}"))
    return grid


def _sizes(fit: Fit) -> Iterator[str]:
    yield f"{fit.layers} layer{'' if fit.layers == 1 else 's'} with vectors"
    for title, widths in (("k/v", fit.key_value), ("fused q, k, v", fit.fused), ("MLP", fit.mlp)):
        if widths:
            yield f"{title} width {' and '.join(f'{width:,}' for width in widths)}"


def _table(description: Description) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", show_footer=True, footer_style="bold")
    table.add_column("module", "all", overflow="fold")
    table.add_column("side", no_wrap=True)
    titles = ("width", "vectors", "mean |l-1|", "max |l-1|", "< 0", "> 2")
    footers = ("", f"× {description.vectors}", *_cells(description.statistics))
    for title, footer in zip(titles, footers, strict=True):
        table.add_column(title, footer, justify="right", no_wrap=True)
    if not description.is_finite:
        table.add_column("NaN/inf", _alarming(description.statistics), justify="right", no_wrap=True)
    for group in description.groups:
        cells = (f"{group.width:,}", f"× {group.vectors}", *_cells(group.statistics))
        alarm = () if description.is_finite else (_alarming(group.statistics),)
        table.add_row(Text(group.name), group.side, *cells, *alarm)
    return table


def _modules_table(description: Description) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("own module", "what it is", "tensors"):
        table.add_column(title, overflow="fold")
    for title in ("numbers", "bytes"):
        table.add_column(title, justify="right", no_wrap=True)
    if not description.is_finite:
        table.add_column("NaN/inf", justify="right", no_wrap=True)
    for module in description.modules:
        cells: list[RenderableType] = [
            Text(module.path),
            module.what,
            Text(module.tensors),
            f"{module.numbers:,}",
            f"{module.bytes:,}",
        ]
        if not description.is_finite:
            cells.append(Text(f"{module.not_finite:,}", style="bold red" if module.not_finite else ""))
        table.add_row(*cells)
    return table


def _cells(statistics: Statistics) -> tuple[str, str, str, str]:
    distances = f"{statistics.mean_distance:.4f}", f"{statistics.max_distance:.4f}"
    return *distances, f"{statistics.negative:,}", f"{statistics.large:,}"


def _alarming(statistics: Statistics) -> Text:
    return Text(f"{statistics.not_finite:,}", style="bold red" if statistics.not_finite else "")
