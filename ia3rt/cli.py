"""The command `ia3rt`: declares its subcommands and options. The work is done elsewhere, imported when asked for."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from ia3rt import __version__
from ia3rt.bench.cli import app as bench
from ia3rt.cli_errors import errors_in_a_line

app = typer.Typer(
    help="Many IA³ adapters on one PyTorch model.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench", help="Measure ia3rt beside PEFT and others, and write a report; compare reports.")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ia3rt {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Many IA³ adapters on one PyTorch model."""


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH_OR_HUB_ID", help="Your own model: a folder, or an id on the Hugging Face Hub."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="An IA³ adapter of --model: a folder or a Hub id. Repeatable."),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A prompt for --model. Repeatable.")] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where to compute, such as cpu; by default cuda if there is one.")
    ] = None,
) -> None:
    """Show on a small model what ia3rt does: a batch of mixed adapters, their accuracy, and what switching costs.

    Takes a minute or two on a CPU. Exits with 1 if the model is not bit for bit itself again at the end.
    """
    from ia3rt.demo import run_demo
    from ia3rt.demo.inputs import bundled_inputs, own_inputs

    console = Console()
    with errors_in_a_line():
        if model is not None:
            inputs = own_inputs(console, model, adapter or [], prompt or [], device)
        elif adapter or prompt:
            raise typer.BadParameter("--adapter and --prompt go with --model, which says what they are for")
        else:
            inputs = bundled_inputs(console, device)
        exact = run_demo(console, inputs)
    raise typer.Exit(0 if exact else 1)


@app.command()
def inspect(
    adapter: Annotated[str, typer.Argument(metavar="PATH_OR_HUB_ID", help="A PEFT IA³ checkpoint.")],
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="The Hub repository's branch, tag or commit.")
    ] = None,
    subfolder: Annotated[
        str | None, typer.Option(metavar="NAME", help="The folder inside that holds the adapter.")
    ] = None,
) -> None:
    """Describe an IA³ adapter: its vectors, how far they are from 1, and which models they fit.

    Loads no model. Exits with 1 if a number is NaN or infinite.
    """
    from ia3rt.checkpoint import read_checkpoint
    from ia3rt.inspect import describe, render

    with errors_in_a_line():
        description = describe(read_checkpoint(adapter, revision=revision, subfolder=subfolder))
    Console().print(render(description, adapter))
    if not description.is_finite:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
