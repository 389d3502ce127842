"""Mixes as text names them: `a*b`, `mix:a*0.7+b*0.3`, `delta:a*0.5`.

    product  =  name "*" name { "*" name }
    sum      =  ( "mix:" | "delta:" ) term { "+" term }
    term     =  name [ "*" weight ]

`a*b` wears both adapters at once, as PEFT does with both active; their order does not matter. `mix:` is PEFT's
weighted sum, `delta:` the weighted sum of what the adapters change (mix.py). A weight left out is 1. A name is
anything without `*`, `+`, `:` and white space; an adapter that has such a name is served, but not mixed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from ia3rt.adapters.mix import CombinationType, Mix, MixLike, added_up, named
from ia3rt.adapters.shortened import short

MOST = 64
"""Adapters in one mix at most: a name of any length is one cheap request."""
MOST_CHARACTERS = 256
"""Of an adapter's name and, for each of its terms, of a weight: whoever sends one has it parsed while others wait."""
_PREFIXES: dict[str, CombinationType] = {"mix:": "linear", "delta:": "delta"}
PREFIXES = tuple(_PREFIXES)
# Python's float() also reads 1_0, and digits of any script.
_NUMBER = re.compile(r"\s*[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
_NAME = re.compile(r"[^*+:\s]+")
# The plus of an exponent, as in a*1e+2, begins no term.
_TERM = re.compile(r"([^*+]*)(?:\*((?:[^+]|(?<=[\d.][eE])\+(?=\d))*))?(\+|\Z)")


class MixNameError(ValueError):
    """A name that means to be a mix and is none."""


def read_mix(spec: MixLike, is_adapter: Callable[[str], bool]) -> Mix:
    """The mix that a user's shorthand means, be it text.

    Args:
        spec: as `Mix.of` takes it, or text as `parse` does.
        is_adapter: whether an adapter has this name, which is what is meant then.

    Raises:
        ValueError: text that begins as a mix and goes on as none, or that would mean a mix if it began as one and names
            no adapter; or what `Mix.of` refuses.
        TypeError: as `Mix.of`.
    """
    if not isinstance(spec, str):
        return Mix.of(spec)
    if is_adapter(spec):
        return named(spec)
    mix = parse(spec) or named(spec)
    unknown = [name for name in mix.adapters if not is_adapter(name)] if is_sum(spec) else ()
    if unknown:
        raise ValueError(
            f"unknown adapter {short(unknown[0])!r}: a weighted sum begins with mix: or delta:, as in "
            f"{'mix:' + short(spec)!r}"
        )
    return mix


def is_sum(name: str) -> bool:
    """Whether text would mean a weighted sum if it began as one."""
    if name.startswith(PREFIXES) or not {"+", "*"} & set(name):
        return False
    try:
        return parse("mix:" + name) is not None
    except MixNameError:
        return False


def parse(name: str) -> Mix | None:
    """The mix that a request's `model` names, or None where it names no mix but, say, an adapter.

    Raises:
        MixNameError: it begins as a mix and goes on as none.
    """
    is_mix = "*" in name or name.startswith(PREFIXES)
    if is_mix:
        _check_text(name)
    for prefix, kind in _PREFIXES.items():
        if name.startswith(prefix):
            return _sum(name, name[len(prefix) :], kind)
    if not is_mix:
        return None
    parts = name.split("*")
    check_size(name, len(parts))
    return _made(name, [_adapter(name, part) for part in parts], None, "product")


def canonical(mix: Mix) -> Mix:
    """The one way to write `mix`: adapters in alphabetical order, each once where the weights of one add up."""
    if mix.weights is None:
        return Mix(tuple(sorted(mix.adapters)))
    weights = added_up(zip(mix.adapters, mix.weights, strict=True))
    return Mix(tuple(weights), tuple(weights.values()), mix.combination_type)


def spelled(mix: Mix) -> str:
    """The name of `mix`; `parse` reads it back, to the bit of each weight."""
    if mix.weights is None:
        return "*".join(mix.adapters)
    prefix = next(prefix for prefix, kind in _PREFIXES.items() if kind == mix.combination_type)
    terms = zip(mix.adapters, mix.weights, strict=True)
    return prefix + "+".join(f"{adapter}*{weight!r}" for adapter, weight in terms)


def _check_text(name: str) -> None:
    """Raises MixNameError where a name is no text, or longer than any mix."""
    most = 2 * MOST * MOST_CHARACTERS
    if len(name) > most:
        raise MixNameError(f"{short(name, 40)!r} has {len(name):,} characters, and a mix has {most:,} at most")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise MixNameError(f"{short(name, 40)!a} is no text: it has half a character, a lone surrogate, in it")


def check_size(name: str, adapters: int) -> None:
    """Raises MixNameError where a mix has more adapters than MOST."""
    if adapters > MOST:
        raise MixNameError(f"{short(name)!r} mixes {adapters} adapters: {MOST} is the most")


def check_name(name: str) -> None:
    """Raises MixNameError where an adapter of this name cannot be part of a mix."""
    _check_text(name)
    if not _NAME.fullmatch(name):
        raise MixNameError(
            f"{short(name)!r} is no name of an adapter that can be mixed: those are without *, +, : and white space"
        )


def _sum(name: str, terms: str, kind: CombinationType) -> Mix:
    adapters: list[str] = []
    weights: list[float] = []
    more, position = True, 0
    while more:
        term = _TERM.match(terms, position)
        assert term is not None  # it matches any text
        adapter, weight, plus = term.groups()
        adapters.append(_adapter(name, adapter))
        weights.append(1.0 if weight is None else _weight(name, weight))
        check_size(name, len(adapters))
        more, position = plus == "+", term.end()
    return _made(name, adapters, weights, kind)


def _made(name: str, adapters: list[str], weights: list[float] | None, kind: CombinationType) -> Mix:
    try:
        return Mix(tuple(adapters), None if weights is None else tuple(weights), kind)
    except ValueError as error:
        raise MixNameError(f"{short(name, 40)!r} is no mix: {short(str(error), 40)}") from error


def _adapter(name: str, part: str) -> str:
    if not _NAME.fullmatch(part.strip()):
        raise MixNameError(
            f"{short(name, 40)!r} is no mix: {short(part, 40)!r} is no adapter's name. Write a*b for a product, "
            "mix:a*0.7+b*0.3 for a weighted sum"
        )
    return part.strip()


def _weight(name: str, part: str) -> float:
    try:
        number = float(part) if len(part) <= MOST_CHARACTERS and _NUMBER.fullmatch(part) else math.nan
        if not math.isfinite(number):
            raise ValueError
        return number
    except ValueError as error:
        raise MixNameError(
            f"{short(name, 40)!r} is no mix: the weight {short(part, 40)!r} is no finite number. Write "
            "mix:a*0.7+b*0.3; a product, a*b, has no weights and no prefix"
        ) from error
