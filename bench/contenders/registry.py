"""All contenders, by name; in the order in which they stand in results."""

from __future__ import annotations

from ia3rt.bench.contenders import adapterhub, base, base_compiled, ia3rt, ia3rt_compiled, merged, peft, peft_compiled
from ia3rt.bench.workshop import Maker

CONTENDERS: dict[str, Maker] = {
    "base": base.subject,
    "base-compiled": base_compiled.subject,
    "merged": merged.subject,
    "peft": peft.subject,
    "peft-compiled": peft_compiled.subject,
    "adapterhub": adapterhub.subject,
    "ia3rt": ia3rt.subject,
    "ia3rt-compiled": ia3rt_compiled.subject,
}
"""By name, what makes its model."""

OURS = ("ia3rt", "ia3rt-compiled")

TWICE = ("base", "peft")
"""Whose second model costs next to no memory, as it shares all weights: it is timed too, as the control."""
