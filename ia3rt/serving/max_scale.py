"""The largest scale that a server lets an adapter or a mix have: an option of `ia3rt serve`.

A scale multiplies keys, values and what goes into an MLP's second layer, and what a layer adds to the residual stream
grows with it. What overflows is answered with noise, so it is refused before it runs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

VARIABLE = "IA3RT_MAX_SCALE"
"""How the option reaches the plugin, which vLLM loads without arguments."""
OPTION = "--max-scale"
_DEFAULT = 1000.0
# Of float16's 65,504, SmolLM2-135M's residual stream reaches 22,000 where every scale is 1, and 46,000 where all are 2.
_DEFAULTS = {"float16": 2.0}


def max_scale(dtype: str, environment: Mapping[str, str] = os.environ) -> float:
    """The limit on |s|, and on the weights of a mix.

    Args:
        dtype: the model's, such as "bfloat16". float16 ends at 65,504, bfloat16 and float32 at 3.4e38.
        environment: what the operator has set.

    Raises:
        ValueError: IA3RT_MAX_SCALE is no number, or less than 1, which everything that is not worn has.
    """
    given = environment.get(VARIABLE)
    return read_max_scale(given) if given else _DEFAULTS.get(dtype, _DEFAULT)


def read_max_scale(text: str) -> float:
    """Reads the limit as a user gives it.

    Raises:
        ValueError: it is no number, not finite, or less than 1.
    """
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 1.0 <= limit < math.inf:
        raise ValueError(f"{OPTION} ({VARIABLE}) must be a number from 1 on, not {text[:80]!r}")
    return limit
