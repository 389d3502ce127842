"""All contenders, by name; in the order in which they stand in results."""

from __future__ import annotations

from ia3rt.bench.contenders import adapterhub, base, compiled, ia3rt, merged, peft
from ia3rt.bench.workshop import Maker

CONTENDERS: dict[str, Maker] = {
    "base": base.subject,
    "base-compiled": compiled.base_subject,
    "merged": merged.subject,
    "peft": peft.subject,
    "peft-compiled": compiled.peft_subject,
    "adapterhub": adapterhub.subject,
    "ia3rt": ia3rt.subject,
    "ia3rt-compiled": compiled.ia3rt_subject,
}
"""By name, what makes its model."""

OURS = ("ia3rt", "ia3rt-compiled")

TWICE = ("base", "peft")
"""Whose second model costs next to no memory, as it shares all weights: it is timed too, as the control."""
