"""Merging what the rows wear into the weights, for export, and taking it back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ia3rt.adapters.bank import Bank, ResolvedMix
from ia3rt.modules.weights import dense_weight
from ia3rt.routing.composed import composed_vectors


@dataclass
class MergedWeights:
    """The weights as they were before a merge: unmerging copies them back, since no division gives them back.

    Attributes:
        originals: each changed tensor and its content before, kept on the CPU.
    """

    originals: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def replace(self, tensor: Tensor, value: Tensor) -> None:
        """Writes `value` into `tensor`, at its address, and remembers what was there."""
        self.originals.append((tensor, tensor.detach().clone().cpu()))
        with torch.no_grad():
            tensor.copy_(value)

    def unmerge(self) -> None:
        """Puts the original weights back, bit for bit."""
        with torch.no_grad():
            for tensor, original in self.originals:
                tensor.copy_(original)


def merge(model: nn.Module, bank: Bank, mix: ResolvedMix) -> MergedWeights:
    """Multiplies a mix into the weights and biases it acts on: W ← diag(s_out) W diag(s_in), b ← s_out ∘ b.

    Computed in float32 (float64 for float64 weights) and rounded once. Either all weights change or none.

    Raises:
        ValueError: a weight is quantised, is shared with another module, or would overflow.
    """
    saved = MergedWeights()
    try:
        for path, s_in, s_out in _scales(bank, mix):
            _merge_layer(model, path, s_in, s_out, saved)
    except BaseException:  # out of memory and Ctrl-C too: never half a merge
        saved.unmerge()
        raise
    return saved


def _scales(bank: Bank, mix: ResolvedMix) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """The modules that the mix acts on, with their composed input and output scales."""
    by_key = {site.key: vector for site, vector in composed_vectors(bank, mix).items()}
    for path in dict.fromkeys(path for path, _ in by_key):
        yield path, by_key.get((path, "in")), by_key.get((path, "out"))


def _merge_layer(model: nn.Module, path: str, s_in: Tensor | None, s_out: Tensor | None, saved: MergedWeights) -> None:
    layer = model.get_submodule(path)
    weight, bias = dense_weight(layer)  # [out, in], a view of the parameter
    if weight is None or not weight.is_floating_point():
        raise ValueError(f"cannot merge into {path!r}: its weight is quantised; merge into the model it was made from")
    owners = {
        name for name, module in model.named_modules() if any(p is layer.weight for p in module.parameters(False))
    }
    if owners != {path}:
        raise ValueError(f"cannot merge into {path!r}: it shares its weight with {sorted(owners - {path})}")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.detach().to(dtype)
    if s_in is not None:
        merged = merged * s_in
    if s_out is not None:
        merged = merged * s_out.unsqueeze(1)
    changes = [(weight, merged)]
    if bias is not None and s_out is not None:
        changes.append((bias, bias.detach().to(dtype) * s_out))
    for tensor, value in changes:
        rounded = value.to(tensor.dtype)
        if not rounded.isfinite().all():
            raise ValueError(f"merging overflows {tensor.dtype} in {path!r}: export the model in a wider dtype")
        saved.replace(tensor, rounded)
