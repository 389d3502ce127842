"""The developers' commands: `python -m ia3rt.bench --help`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ia3rt.bench import document as documents
from ia3rt.bench import recorded as records
from ia3rt.bench.profile import document as profiles
from ia3rt.bench.result import read_json, write_json
from ia3rt.bench.runner import run
from ia3rt.bench.serving import tables as serving_tables
from ia3rt.bench.settings import Effort, Settings
from ia3rt.bench.shapes import SHAPES
from ia3rt.bench.study.cli import RESULTS, study
from ia3rt.bench.study.document import write_page
from ia3rt.bench.terminal import print_result, shown_progress
from ia3rt.bench.tuning import ahead
from ia3rt.bench.tuning.registry import OPERATIONS
from ia3rt.bench.tuning.search import measure_on
from ia3rt.bench.tuning.search import tune as find_best
from ia3rt.cli.errors import INTERRUPTED, errors_in_a_line
from ia3rt.kernels.configs import arch_of, processors_of
from ia3rt.kernels.tuned import ROWS, write_configs

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.command()(study)


@app.command()
@errors_in_a_line()
def document(file: Annotated[Path, typer.Argument(help="docs/kernels.md")] = Path("docs/kernels.md")) -> None:
    """Write the table of compiled kernels and the roofline's in docs/kernels.md. No GPU is needed."""
    documents.write(file)


@app.command()
@errors_in_a_line()
def recorded(
    kernels: Annotated[Path, typer.Option(help="docs/kernels.md")] = Path("docs/kernels.md"),
    performance: Annotated[Path, typer.Option(help="docs/performance.md")] = Path("docs/performance.md"),
    combining: Annotated[Path, typer.Option(help="docs/combining.md")] = Path("docs/combining.md"),
) -> None:
    """Write what bench/results keeps, measured on GPUs or by `study`, into the documents. No GPU is needed."""
    documents.write_roofline(kernels)
    records.write_kernels(kernels)
    records.write_performance(performance)
    if (RESULTS / "run.json").is_file():
        write_page(combining, RESULTS)


@app.command()
@errors_in_a_line()
def profile(
    file: Annotated[Path, typer.Argument(help="docs/performance.md")] = Path("docs/performance.md"),
    counted: Annotated[bool, typer.Option("--counted", help="Only what is counted: no timing.")] = False,
) -> None:
    """Count and time where a forward's time and memory go, and write the tables of docs/performance.md."""
    profiles.write_counted(file)
    if not counted:
        profiles.write_timed(file)


@app.command()
@errors_in_a_line()
def measured(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT.json…", help="Runs of `ia3rt bench`.")],
    file: Annotated[Path, typer.Option(help="Where the tables go; the plots go beside it.")] = Path(
        "docs/performance.md"
    ),
) -> None:
    """Write the measured tables and the plots of docs/performance.md."""
    profiles.write_measured(file, [read_json(result) for result in results])


@app.command()
@errors_in_a_line()
def switching(
    result: Annotated[Path, typer.Argument(metavar="RESULT.json", help="A run of `ia3rt bench switch`.")],
    file: Annotated[Path, typer.Option(help="Where the table goes.")] = Path("docs/performance.md"),
) -> None:
    """Write the table of switching in docs/performance.md."""
    profiles.write_switching(file, read_json(result))


@app.command()
@errors_in_a_line()
def scaled(
    result: Annotated[Path, typer.Argument(metavar="RESULT.json", help="A run of `ia3rt bench scale`.")],
    file: Annotated[Path, typer.Option(help="Where the table goes.")] = Path("docs/performance.md"),
) -> None:
    """Write the table of many registered adapters in docs/performance.md."""
    profiles.write_scale(file, read_json(result))


@app.command()
@errors_in_a_line()
def launching(file: Annotated[Path, typer.Argument(help="docs/performance.md")] = Path("docs/performance.md")) -> None:
    """Time launches as `ia3rt bench launch` does, and write the table of launching in docs/performance.md."""
    profiles.write_launching(file)


@app.command()
@errors_in_a_line()
def calling(file: Annotated[Path, typer.Argument(help="docs/performance.md")] = Path("docs/performance.md")) -> None:
    """Time what calls of compiled models cost the host, and write the table in docs/performance.md."""
    profiles.write_calling(file)


@app.command()
@errors_in_a_line()
def served(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT.json…", help="Runs of `ia3rt bench serve`.")],
    file: Annotated[Path, typer.Option(help="Where the tables go.")] = Path("docs/serving.md"),
) -> None:
    """Write the measured tables of docs/serving.md."""
    serving_tables.write(file, results)


@app.command()
def layers(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3-8b",
    cases: Annotated[str, typer.Option(help="Only the cases of such a name, as in --cases '* rows=16 *'.")] = "*",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(help="How often each way is timed.")] = 50,
    out: Annotated[Path | None, typer.Option(help="Write the times to this JSON file.")] = None,
) -> None:
    """Time each operation of a decoder layer: fused, without IA³, with a separate scale, and PEFT.

    It is `ia3rt bench kernels` in as many rounds as are asked for, and without repeats within one.
    """
    effort = Effort(least=rounds, most=rounds, seconds=0, sample=0)
    asked = Settings(["kernels"], [], cases, shape, device=_gpu(), dtype=getattr(torch, dtype), effort=effort)
    console = Console()
    with errors_in_a_line(), shown_progress(console) as progress:
        result = run(asked, progress)
    print_result(console, result)
    if out is not None:
        write_json(result, out)
    if result.is_stopped:
        raise typer.Exit(INTERRUPTED)


@app.command()
def tune(
    shape: Annotated[list[str], typer.Option(help="A model's widths; may be repeated.")] = ["llama-3-8b"],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    operation: Annotated[list[str], typer.Option(help="Only this one; may be repeated.")] = list(OPERATIONS),  # noqa: B006
) -> None:
    """Measure block sizes on this GPU, and write what beats the defaults where the kernels read it."""
    device = _gpu()
    card, arch, processors = torch.cuda.get_device_name(device), arch_of(device), processors_of(device)
    problems = {
        name: [each for width in shape for each in OPERATIONS[name].shapes(SHAPES[width], getattr(torch, dtype), ROWS)]
        for name in operation
    }
    work = ahead.tasks([(name, each) for name, shapes in problems.items() for each in shapes], arch, processors)
    failed = [error for error in track(ahead.build(work, arch, processors), "building", len(work)) if error]
    for error in failed:
        print(f"not built: {error}")
    better: dict[str, dict[Any, Any]] = {}
    for name, shapes in problems.items():
        table = Table("shape", "× default", "config", title=f"{name}: {card}, {dtype}", box=None, header_style="bold")
        found = find_best(OPERATIONS[name], shapes, measure_on(device), arch, processors)
        for problem, config, share in track(found, f"measuring {name}", len(shapes)):
            words = ", ".join(f"{key} {value}" for key, value in problem._asdict().items() if key != "dtype")
            table.add_row(words, f"{share:.3f}", "torch" if config is None else str(config))
            if share < 1:
                better.setdefault(name, {})[problem] = config
        Console().print(table)
        print(
            f"{len(better.get(name, {}))} of {len(shapes)} are better than the defaults: {write_configs(card, better)}"
        )


def _gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise typer.BadParameter("this needs a GPU, and there is none here")
    return torch.device("cuda", torch.cuda.current_device())


if __name__ == "__main__":
    app(prog_name="python -m ia3rt.bench")
