"""The names that a server loads adapters under: those that mean nothing else in a request."""

from __future__ import annotations

from ia3rt.adapters.mix_text import MOST_CHARACTERS, MixNameError, parse
from ia3rt.adapters.shortened import short


def check_loaded_name(name: str) -> None:
    """Raises MixNameError where no adapter is loaded under a name: it means a mix, is long, or breaks a log's lines."""
    if len(name) > MOST_CHARACTERS:
        raise MixNameError(
            f"The name `{short(name)}` has {len(name):,} characters, and {MOST_CHARACTERS} are the most: load the "
            "adapter under another one."
        )
    try:
        means_a_mix = parse(name) is not None
    except MixNameError:
        means_a_mix = True
    if means_a_mix:
        raise MixNameError(f"The name `{short(name)}` means a mix of adapters: load the adapter under another one.")
    if not name.isprintable():
        raise MixNameError(
            f"The name {short(repr(name))} has characters of control: load the adapter under another one."
        )
