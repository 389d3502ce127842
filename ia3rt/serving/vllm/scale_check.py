"""Composes an adapter or a mix, and refuses it where its scales or weights are larger than a server allows."""

from __future__ import annotations

from torch import Tensor

from ia3rt.adapters.bank import Bank
from ia3rt.adapters.mix import Mix
from ia3rt.adapters.mix_text import MixNameError, spelled
from ia3rt.adapters.shortened import short
from ia3rt.adapters.site import Site
from ia3rt.routing.composed import composed_vectors
from ia3rt.serving.max_scale import OPTION, VARIABLE


class LargeScaleError(MixNameError):
    """A scale or a weight beyond the limit."""


def checked_vectors(bank: Bank, mix: Mix, limit: float) -> dict[Site, Tensor]:
    """Composes a mix as the engine wears it.

    Args:
        bank: the mix's adapters, float32.
        mix: what to compose; an adapter alone too.
        limit: what |s| and each |weight| may be at most.

    Returns:
        float32 [width] by site, of the sites where any of the adapters acts.

    Raises:
        LargeScaleError: a weight is beyond the limit, or a composed scale is, or is no number.
    """
    for adapter, weight in zip(mix.adapters, mix.weights or (), strict=False):
        if abs(weight) > limit:
            site = max(bank.vectors(bank.adapters[adapter]).items(), key=lambda item: float(item[1].abs().max()))[0]
            raise LargeScaleError(_sentence(mix, adapter, site, f"its weight is {weight:.6g}", limit))
    vectors = composed_vectors(bank, bank.resolve(mix))
    for site, vector in vectors.items():
        # Written so that NaN, which compares with nothing, is beyond it too.
        beyond = (~(vector.abs() <= limit)).nonzero()
        if len(beyond):
            column = int(beyond[0])
            adapter = max(mix.adapters, key=lambda name: _share(bank, mix, name, site, column))
            raise LargeScaleError(_sentence(mix, adapter, site, f"the scale is {float(vector[column]):.6g}", limit))
    return vectors


def _share(bank: Bank, mix: Mix, name: str, site: Site, column: int) -> float:
    """How much an adapter has to do with a scale."""
    vector = bank.vectors(bank.adapters[name]).get(site)
    value = 1.0 if vector is None else float(vector[column])
    return abs(value) * (1.0 if mix.weights is None else abs(mix.weights[mix.adapters.index(name)]))


def _sentence(mix: Mix, adapter: str, site: Site, told: str, limit: float) -> str:
    alone = mix.weights is None and len(mix.adapters) == 1
    what = "" if alone else f"the mix {short(spelled(mix), 40)!r} cannot be served: "
    return (
        f"{what}adapter {short(adapter, 40)!r} cannot be worn at {site}: {told}, and at most {limit:g} is served here, "
        f"lest the model's numbers overflow. Start the server with a larger {OPTION} ({VARIABLE}) if it is meant"
    )
