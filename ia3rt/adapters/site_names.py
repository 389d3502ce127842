"""How an adapter's config names the modules where it acts, so that PEFT means these and no others.

PEFT compares target_modules by components: `0` there means `layers.0` too. feedforward_modules, which say what acts at
an input, it compares as raw endings: `fc` there means `pre_fc` too, and `quant_conv` the whole path `post_quant_conv`.
A string is a pattern for a whole path in both.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeAlias

from ia3rt.adapters.site import Side, name_matches

ConfigNames: TypeAlias = "list[str] | str"
"""Names, or the pattern of `pattern_of`."""


def config_names(sides: Mapping[str, Side], module_names: Collection[str] | None) -> tuple[ConfigNames, ConfigNames]:
    """What target_modules and feedforward_modules are to say: the shortest names that tell, else a pattern.

    Args:
        sides: by module path, where it wears its vector.
        module_names: of all the model's modules; None where these are not known, so that names are whole paths.
    """
    others = set(module_names or ()) - sides.keys()
    depth = max((path.count(".") + 1 for path in sides), default=0)
    target: list[str] = []
    for last in range(depth if module_names is None else 1, depth + 1):
        target = sorted({".".join(path.split(".")[-last:]) for path in sides})
        inputs = _of_inputs(target, sides)
        if _mean_none(target, others) and _tell(inputs, sides):
            return target, inputs
    inputs = _of_inputs(target, sides)
    return (
        target if _mean_none(target, others) else pattern_of(sides),
        inputs if _tell(inputs, sides) else pattern_of(path for path, side in sides.items() if side == "in"),
    )


def pattern_of(paths: Iterable[str]) -> str:
    """A pattern that these paths match and no others."""
    return "|".join(map(re.escape, sorted(paths)))


def paths_of(pattern: str) -> list[str] | None:
    """The paths that `pattern_of` made a pattern of, which is not run; None where it is another one."""
    parts = re.findall(r"(?:\\.|[^\\|])+", pattern)
    paths = [re.sub(r"\\(.)", r"\1", part) for part in parts]
    return paths if "|".join(map(re.escape, paths)) == pattern else None


def _of_inputs(names: Iterable[str], sides: Mapping[str, Side]) -> list[str]:
    return sorted(
        {name for name in names if any(side == "in" and name_matches(path, [name]) for path, side in sides.items())}
    )


def _mean_none(names: Collection[str], others: Iterable[str]) -> bool:
    return not any(name_matches(other, names) for other in others)


def _tell(inputs: Collection[str], sides: Mapping[str, Side]) -> bool:
    """Whether PEFT takes no output for an input."""
    return not any(side == "out" and path.endswith(tuple(inputs)) for path, side in sides.items())
