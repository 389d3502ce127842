"""The command `ia3rt`: declares its subcommands and options. The work is done elsewhere, imported when asked for."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ia3rt import __version__
from ia3rt.bench.cli import app as bench
from ia3rt.cli.errors import errors_in_a_line, print_anything, reporting_on

_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
_Output = Annotated[
    Path, typer.Option("-o", "--output", metavar="DIR", help="A folder that is not there yet, or is empty.")
]

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
    print_anything()


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
    from ia3rt.cli.demo import run_demo
    from ia3rt.cli.demo.inputs import bundled_inputs, own_inputs

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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or an id on the Hugging Face Hub.")],
    adapters: Annotated[
        Path, typer.Option(metavar="DIR", help="A folder with a folder for each adapter, IA³ or LoRA.")
    ],
    host: Annotated[str, typer.Option(help="Where the server listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where the server listens.", min=0, max=65535)] = 8000,
    max_loras: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="How many different adapters and mixes one batch may have; as many as there are, up to 32.",
            show_default=False,
        ),
    ] = None,
    max_scale: Annotated[
        str | None,
        typer.Option(
            metavar="S",
            help="The largest scale, and weight of a mix, that is served; 1000, and 2 for a model in float16.",
            show_default=False,
        ),
    ] = None,
    allow_adapters: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Let clients load adapters while it runs, from this folder only."),
    ] = None,
    store_gb: Annotated[
        float | None,
        typer.Option(metavar="GB", help="How large the store of adapters may become; 8.", show_default=False),
    ] = None,
) -> None:
    """Serve a model with a folder of adapters: vLLM's OpenAI server, with the options that this needs.

    A request's model is an adapter's name, or a mix such as a*b or mix:a*0.7+b*0.3. Other options go to vLLM, such as
    --dtype bfloat16 or --tensor-parallel-size 2.
    """
    from ia3rt.serving.command import serve as become_server

    with errors_in_a_line():
        become_server(
            Console(), model, adapters, host, port, max_loras, max_scale, context.args, allow_adapters, store_gb
        )


@app.command()
def store(
    clean: Annotated[
        bool, typer.Option("--clean", help="Remove what no running server has loaded, down to --keep-gb.")
    ] = False,
    keep_gb: Annotated[
        float, typer.Option(metavar="GB", min=0.0, help="With --clean: how many GB of the last used to keep.")
    ] = 0.0,
) -> None:
    """List the servers' store of adapters, or clean it."""
    from ia3rt.serving.store_command import clean_store, list_store

    with errors_in_a_line():
        if clean:
            clean_store(Console(), keep_gb)
        else:
            list_store(Console())


@app.command()
def inspect(
    adapters: Annotated[
        list[str], typer.Argument(metavar="PATH_OR_HUB_ID…", help="IA³ checkpoints of PEFT's or AdapterHub's.")
    ],
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="The Hub repository's branch, tag or commit.")
    ] = None,
    subfolder: Annotated[
        str | None, typer.Option(metavar="NAME", help="The folder inside that holds the adapter.")
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Describe an IA³ adapter: its vectors, how far they are from 1, which models they fit, and what else it brings.

    Several are compared, by pairs: whether they act at the same places, the cosine of what they change, and how often
    they change a number in the same direction. Loads no model. Exits with 1 if a number is NaN or infinite.
    """
    from ia3rt.adapters.checkpoint import read_checkpoint
    from ia3rt.cli.comparison import compare_all
    from ia3rt.cli.comparison import render as render_all
    from ia3rt.cli.files import print_json, read_all
    from ia3rt.cli.inspection import describe, render

    with errors_in_a_line():
        if len(adapters) == 1:
            description = describe(read_checkpoint(adapters[0], revision=revision, subfolder=subfolder))
            described, output = [description], render(description, adapters[0])
            report = {"adapter": adapters[0], **asdict(description)}
        elif revision or subfolder:
            raise typer.BadParameter("--revision and --subfolder go with one adapter")
        else:
            compared = compare_all(read_all(Console(stderr=True), adapters))
            described, output, report = [*compared.adapters.values()], render_all(compared), asdict(compared)
        if as_json:
            print_json(report)
        else:
            Console().print(output)
    if not all(description.is_finite for description in described):
        raise typer.Exit(1)


@app.command()
def combine(
    adapters: Annotated[
        list[str], typer.Argument(metavar="PATH_OR_HUB_ID…", help="IA³ adapters of one model; no model is needed.")
    ],
    output: _Output,
    combination_type: Annotated[
        str,
        typer.Option(
            "--type",
            metavar="NAME",
            help="product, linear, delta, power, ties, dare_linear, dare_ties, magnitude_prune, max_abs, fisher, "
            "negate, analogy or slerp.",
        ),
    ] = "product",
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,…",
            help="One for each adapter, as in --weights 0.7,0.3. Where none are given: 1 each, of delta 0.85; linear, "
            "slerp and delta of one adapter need them.",
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="For ties (0.4 where none is given), dare_… and magnitude_prune: what share stays."
        ),
    ] = None,
    majority_sign_method: Annotated[
        str, typer.Option(metavar="NAME", help="For ties and dare_ties: total or frequency.")
    ] = "total",
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="For dare_…; 0 where none is given.", show_default=False)
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Divide the weights by their sum.")] = False,
    importances: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="For fisher, once for each adapter: importances, as an adapter's files."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="What the result says that it was trained on.")
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Combine IA³ adapters into one, in PEFT's format.

    product multiplies the vectors, as wearing all adapters at once does; power
    gives each an exponent. linear is PEFT's weighted sum of vectors, fisher their
    mean by importances. delta adds what each adapter changes, by weights; ties,
    dare_…, magnitude_prune and max_abs what is left of it when some was dropped.
    slerp goes from one adapter to another along an arc, negate takes away what
    one changes, and analogy of A, B and C adds B less A to C.

    On small models nothing kept significantly more of two adapters than product,
    and nothing more of five than delta.
    """
    from ia3rt.adapters.checkpoint import read_checkpoint
    from ia3rt.adapters.combining.combination import Combination
    from ia3rt.cli.combining import combine as combine_files
    from ia3rt.cli.combining import parse_weights
    from ia3rt.cli.files import print_json
    from ia3rt.cli.inspection import describe, render

    with errors_in_a_line():
        combination = Combination(
            tuple(adapters),
            parse_weights(weights),
            combination_type,  # type: ignore[arg-type]
            density,
            majority_sign_method,  # type: ignore[arg-type]
            seed,
            normalize,
        )
        combine_files(Console(stderr=True), combination, output, importances or [], base_model)
        description = describe(read_checkpoint(output))
        with reporting_on(output):
            if as_json:
                taken = {**asdict(combination), "weights": combination.taken_weights}
                print_json({"adapter": str(output), "combination": taken, **asdict(description)})
            else:
                Console().print(Text(combination.in_full), soft_wrap=True)
                Console().print(render(description, str(output)))


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="PATH_OR_HUB_ID", help="An IA³ adapter of AdapterHub's or PEFT's, a pickle too.")
    ],
    output: _Output,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="The Hub repository's branch, tag or commit.")
    ] = None,
    subfolder: Annotated[
        str | None, typer.Option(metavar="NAME", help="The folder inside that holds the adapter.")
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Write an IA³ adapter of any format that is read in PEFT's, as safetensors."""
    from ia3rt.adapters.checkpoint import read_checkpoint
    from ia3rt.cli.converting import convert as convert_files
    from ia3rt.cli.files import print_json
    from ia3rt.cli.inspection import describe, render

    with errors_in_a_line():
        written_by = convert_files(Console(stderr=True), source, output, revision, subfolder)
        description = describe(read_checkpoint(output))
        with reporting_on(output):
            if as_json:
                print_json({"adapter": str(output), "converted_from": written_by, **asdict(description)})
            else:
                Console().print(render(description, str(output)))


@app.command()
def merge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or an id on the Hugging Face Hub.")],
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER…", help="Its IA³ adapters: folders or Hub ids.")],
    output: _Output,
    as_json: _AsJson = False,
) -> None:
    """Multiply IA³ adapters into a model's weights and write the model, which needs no ia3rt and no PEFT then.

    Several are multiplied. To have them combined otherwise, combine them first and merge what that gives.
    """
    from ia3rt.cli.files import print_json
    from ia3rt.cli.loading import some
    from ia3rt.cli.merging import merge as merge_files

    with errors_in_a_line():
        merged = merge_files(Console(stderr=True), model, adapters, output)
        with reporting_on(output):
            if as_json:
                print_json({"model": str(output), "adapters": adapters, **asdict(merged)})
            else:
                Console().print(Text(f"{output}: {merged.in_words}; merged: {', '.join(adapters)}"), soft_wrap=True)
                for names, why in (
                    (merged.not_copied, "are code, and not copied"),
                    (merged.left_out, f"have no place in {merged.architecture}, and are left out"),
                ):
                    if names:
                        Console(stderr=True).print(Text(f"{some(names)} {why}"), soft_wrap=True)
