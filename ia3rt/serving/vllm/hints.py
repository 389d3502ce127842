"""What somebody may have meant by a name that nothing is served under."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice

from ia3rt.adapters.mix_text import is_sum
from ia3rt.adapters.shortened import short

MOST = 3
"""Names that are told."""
LOOKED_AT = 1_000
"""Loaded names that are looked at, and
COMPARED
    of those the ones that are compared letter by letter: somebody waits for each wrong name that somebody sends."""
COMPARED = 100
_LETTERS = 40
"""Of a loaded name, from its beginning, that are looked at, and told."""
_REPEATED = 26
"""Letters of what a client sent that may be told once more: the error before has told them up to two times."""


def hint(name: str, unknown: str, loaded: Iterable[str]) -> str:
    """A sentence to go after an error about an unknown name, with a space before it; "" where nothing comes to mind.

    Args:
        name: what a client sent as the model.
        unknown: the part of it that is not known.
        loaded: the names that are.
    """
    if is_sum(name):
        shown = f"mix:{name}" if len(name) <= _REPEATED else "mix:a*0.7+b*0.3"
        return f" A weighted sum begins with mix: or delta:, as in `{shown}`."
    return _near(unknown, loaded)


def _near(name: str, loaded: Iterable[str]) -> str:
    asked = name[:_LETTERS].casefold()
    known = {other[:_LETTERS].casefold(): other for other in islice(loaded, LOOKED_AT)}
    alike = (other for other in known if len(set(other) ^ set(asked)) <= 4)
    found = difflib.get_close_matches(asked, list(islice(alike, COMPARED)), MOST, 0.7)
    if not found:
        return ""
    return f" Did you mean {' or '.join(f'`{short(known[other], _LETTERS)}`' for other in found)}?"
