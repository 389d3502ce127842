"""What the load test wears: many small adapters on the disk, and what a model computes with each, in float64."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from tiny import TARGETS, tiny_model
from torch import Tensor

LAYERS = 2
WIDTHS = {"self_attn.k_proj": 32, "self_attn.v_proj": 32, "mlp.down_proj": 96}
SITES = {f"model.layers.{layer}.{name}": width for layer in range(LAYERS) for name, width in WIDTHS.items()}
TOTAL = sum(SITES.values())
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_CONFIG = json.dumps({"peft_type": "IA3", "task_type": "CAUSAL_LM", **TARGETS["llama"]})


@dataclass(frozen=True)
class Worn:
    """What a row wears.

    Attributes:
        contents: of the adapters: what `vectors` makes their numbers of.
        kind: how they combine.
        weights: one for each; of a product there are none.
    """

    contents: tuple[int, ...] = ()
    kind: str = "product"
    weights: tuple[float, ...] = ()


def vectors(content: int) -> Tensor:
    """An adapter's numbers, float32 [TOTAL], by the order of SITES."""
    return 1 + 0.3 * torch.randn(TOTAL, generator=torch.Generator().manual_seed(content))


def by_site(content: int) -> dict[str, Tensor]:
    """The same, by the path of the module."""
    return dict(zip(SITES, vectors(content).split(list(SITES.values())), strict=True))


def as_file(content: int) -> bytes:
    """The same, as PEFT writes it."""
    shapes = {path: (1, -1) if path.endswith("down_proj") else (-1, 1) for path in SITES}
    tensors = {
        f"base_model.model.{path}.ia3_l": vector.reshape(shapes[path]) for path, vector in by_site(content).items()
    }
    return save({key: tensor.contiguous() for key, tensor in tensors.items()}, metadata={"format": "pt"})


def write(folder: Path, content: int) -> None:
    """Writes an adapter's folder; over one that is there as an atomic save does."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CONFIG).exists():
        (folder / CONFIG).write_text(_CONFIG)
    put(folder / WEIGHTS, as_file(content))


def put(file: Path, content: bytes) -> None:
    """Makes a file be another one at once."""
    made = file.with_name(f"{file.name}.new")
    made.write_bytes(content)
    made.replace(file)


class Reference:
    """The model in float64 whose layers are scaled by hand, each row by what it wears: y = l ∘ (W x + b), W (l ∘ x)."""

    def __init__(self) -> None:
        self._model = tiny_model().double()
        self._scales: dict[str, Tensor] = {}
        for path in SITES:
            layer = self._model.get_submodule(path)
            if path.endswith("down_proj"):
                layer.register_forward_pre_hook(lambda _, given, path=path: (given[0] * self._scales[path],))
            else:
                layer.register_forward_hook(lambda _, __, out, path=path: out * self._scales[path])

    @torch.no_grad()
    def logits(self, ids: Tensor, worn: Sequence[Worn]) -> Tensor:
        """What rows of tokens [rows, length] that wear these give, [rows, length, vocabulary]."""
        composed = torch.stack([_composed(each) for each in worn])
        parts = composed.split(list(SITES.values()), dim=1)
        self._scales = {path: part[:, None] for path, part in zip(SITES, parts, strict=True)}
        return self._model(input_ids=ids, use_cache=False).logits


def _composed(worn: Worn) -> Tensor:
    """Π l, Σ w l, or 1 + Σ w (l - 1), in float64."""
    of_each = [vectors(content).double() for content in worn.contents]
    if worn.kind == "product":
        composed = torch.ones(TOTAL, dtype=torch.float64)
        for each in of_each:
            composed = composed * each
        return composed
    from_one = float(worn.kind == "delta")
    terms = [weight * (each - from_one) for each, weight in zip(of_each, worn.weights, strict=True)]
    return from_one + torch.stack(terms).sum(0)
