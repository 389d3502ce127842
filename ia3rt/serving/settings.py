"""What an operator says to the plugin: by the environment, which all of vLLM's processes inherit.

`ia3rt serve` has an option for each of them, and says the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ia3rt.serving.max_scale import max_scale

ALLOW_ADAPTERS = "IA3RT_ALLOW_ADAPTERS"
"""The folder that clients may load adapters from; by default they load whatever the server can read."""
STORE_GB = "IA3RT_STORE_GB"
"""How large the store of adapters may become, in units of 10^9 bytes."""
KEY_FOR_ALL = "IA3RT_KEY_FOR_ALL"
"""`1`: vLLM's key is asked for at every door but those that say how the server is."""
LOADING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
"""vLLM's: `1`, and clients may load and unload."""
DEFAULT_STORE_GB = 8.0


@dataclass(frozen=True)
class Setting:
    """A variable of the environment that a server is started with, its value, and why."""

    name: str
    value: str
    why: str


def check_settings(environment: Mapping[str, str] = os.environ) -> None:
    """Reads all that an operator may say, before a server starts with it.

    Raises:
        ValueError: something means nothing; the sentence says what was seen, and what was expected.
    """
    store_bytes(environment)
    is_key_for_all(environment)
    max_scale("float32", environment)


def allowed_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The folder that clients may load adapters from; None for any."""
    given = environment.get(ALLOW_ADAPTERS)
    return Path(given) if given else None


def store_bytes(environment: Mapping[str, str] = os.environ) -> float:
    """How large the store may become, in bytes.

    Raises:
        ValueError: the environment says no number above 0.
    """
    given = environment.get(STORE_GB) or str(DEFAULT_STORE_GB)
    try:
        size = 1e9 * float(given)
    except ValueError:
        size = 0.0
    if not 0.0 < size < float("inf"):
        raise ValueError(f"{STORE_GB} is {given!r}: expected how many GB the store of adapters may take, such as 8")
    return size


def is_key_for_all(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether vLLM's key is asked for where vLLM itself asks for none.

    Raises:
        ValueError: the environment says neither yes nor no.
    """
    given = environment.get(KEY_FOR_ALL) or "0"
    if given not in ("0", "1"):
        raise ValueError(f"{KEY_FOR_ALL} is {given!r}: expected 1, or 0")
    return given == "1"


def store_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of stored adapters, which all workers have to see: ia3rt/adapters in vLLM's folder for caches."""
    caches = environment.get("XDG_CACHE_HOME") or "~/.cache"
    root = environment.get("VLLM_CACHE_ROOT") or f"{caches}/vllm"
    return Path(root).expanduser() / "ia3rt" / "adapters"
