"""The commands under `ia3rt bench`, and the options of `run` and `compare`. The work is done elsewhere."""

from __future__ import annotations

import importlib.util
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.text import Text

from ia3rt.bench.launches.cli import launch
from ia3rt.bench.options import known, split
from ia3rt.bench.serving.cli import serve
from ia3rt.cli.errors import INTERRUPTED, MissingPackageError, UsageError, errors_in_a_line

if TYPE_CHECKING:
    import torch

    from ia3rt.bench.result import Result
    from ia3rt.bench.settings import Settings


class _RunByDefault(typer.core.TyperGroup):
    """A group in which what names no command is for `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = args and args[0] in self.commands
        return super().parse_args(ctx, args if known else ["run", *args])


app = typer.Typer(cls=_RunByDefault, add_completion=False)
app.command()(serve)
app.command()(launch)


@app.command()
def run(
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SUITE",
            help="forward, generate, switch, mixed, combine, load, train, memory, document, scale, kernels (on a GPU "
            "only). All without any.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="A built-in shape with random weights (smollm2-135m, llama-3.2-1b, llama-3-8b: a few layers only, "
            "tiny), a folder, or a Hugging Face id.",
        ),
    ] = "smollm2-135m",
    layers: Annotated[int | None, typer.Option(metavar="N", help="How many layers of a built-in shape.")] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Such as cpu; by default cuda if there is one.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="float32, bfloat16 or float16; by default float32 on a CPU, and else bfloat16."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help="What is compared: base, base-compiled, merged, peft, peft-compiled, adapterhub, ia3rt, "
            "ia3rt-compiled. All by default; with --quick none that compiles.",
        ),
    ] = None,
    cases: Annotated[
        str, typer.Option(metavar="PATTERN", help="Only the cases of such a name, as in --cases 'decode rows=1 *'.")
    ] = "*",
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer cases: ends in two minutes on two cores. All take an hour or more.")
    ] = False,
    graph: Annotated[
        bool,
        typer.Option(
            "--graph",
            help="On CUDA: each case of forward and mixed once more in a CUDA graph, and generate with a static cache, "
            "whose steps transformers compiles.",
        ),
    ] = False,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the JSON, CSV and HTML files go.")] = Path(
        "bench-results"
    ),
    budget: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A budget of ratios, such as bench/budget.json; exits with 1 if one breaks."),
    ] = None,
    adapterhub_python: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The Python of an environment with AdapterHub's `adapters`.")
    ] = None,
) -> None:
    """Measure ia3rt beside PEFT and others, and write a report.

    `ia3rt bench compare BEFORE.json AFTER.json` compares two runs; `ia3rt bench launch` times launches without a GPU,
    `ia3rt bench serve` vLLM's server.

    All contenders of a case are timed in turn; a ratio that is noise is not printed. Exits with 1 if ia3rt fails in a
    case, a budget is broken or nothing was measured; with 130 after Ctrl-C, which keeps what was measured.
    """
    with errors_in_a_line():
        from ia3rt.bench.budget import read_budget

        given = dict(model=model, layers=layers, quick=quick, graph=graph, cases=cases)
        settings = _settings(suites, against, device, dtype, adapterhub_python=adapterhub_python, **given)
        rules = read_budget(budget) if budget is not None else []
        if importlib.util.find_spec("matplotlib") is None:
            raise MissingPackageError("the report needs matplotlib: pip install 'ia3rt[bench]'")
        out.mkdir(parents=True, exist_ok=True)
        from ia3rt.bench import terminal
        from ia3rt.bench.runner import run as measure

        console = Console()
        with terminal.shown_progress(console) as progress:
            result = measure(settings, progress)
        terminal.print_result(console, result)
        for file in _write(result, out):
            console.print(Text(f"written: {file}", style="dim"), soft_wrap=True)
        kept = not rules or _keeps(console, result, rules)
    if result.is_stopped:
        raise typer.Exit(INTERRUPTED)
    if result.is_empty:
        console.print(Text("nothing was measured", style="red"))
    raise typer.Exit(0 if kept and not result.is_empty and not _ours_failed(result) else 1)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE.json")],
    after: Annotated[Path, typer.Argument(metavar="AFTER.json")],
) -> None:
    """Compare the ratios of two runs. Exits with 1 if ia3rt became slower, failed, or is measured no more."""
    with errors_in_a_line():
        from ia3rt.bench.compare import compare as changes_of
        from ia3rt.bench.result import read_json
        from ia3rt.bench.terminal import print_changes

        changes = changes_of(read_json(before), read_json(after))
    print_changes(Console(), changes)
    raise typer.Exit(1 if any(change.is_regression for change in changes) else 0)


def _settings(
    suites: list[str] | None, against: str | None, device: str | None, dtype: str | None, **given: Any
) -> Settings:
    from ia3rt.bench.contenders.registry import CONTENDERS
    from ia3rt.bench.models import shape_of
    from ia3rt.bench.settings import FULL, QUICK, Settings
    from ia3rt.bench.suites.registry import SUITES, cases_of
    from ia3rt.cli.demo.inputs import device_of

    where, quick = device_of(device), given["quick"]
    default = [name for name in CONTENDERS if not (quick and name.endswith("-compiled"))]
    settings = Settings(
        suites=known("SUITE", suites or list(SUITES), SUITES),
        contenders=known("--against", default if against is None else split(against), CONTENDERS),
        device=where,
        dtype=_dtype(dtype, where),
        effort=QUICK if quick else FULL,
        **given,
    )
    shape_of(settings)  # says if --layers is of no use
    why = {name: SUITES[name].wants(where) for name in settings.suites}
    if all(why.values()):
        raise UsageError("SUITE", "; ".join(f"{name}: {reason}" for name, reason in why.items()))
    if settings.graph:
        _check_graph(settings)
    cases_of(settings)  # says if --cases is of no use
    python = settings.adapterhub_python
    if python is not None and not python.is_file():
        raise UsageError("--adapterhub-python", f"there is no file {python}")
    return settings


def _check_graph(settings: Settings) -> None:
    """Says if --graph is of no use."""
    import torch

    from ia3rt.bench.suites.registry import SUITES

    if settings.device.type != "cuda":
        advice = "give --device cuda" if torch.cuda.is_available() else "torch sees no GPU here, so leave --graph out"
        raise UsageError("--graph", f"CUDA graphs need a CUDA GPU, and this run is on {settings.device}: {advice}")
    graphed = [name for name, suite in SUITES.items() if suite.in_graph is not None]
    if not set(graphed) & set(settings.suites):
        raise UsageError("--graph", f"goes with the suites {', '.join(graphed)}, not with {', '.join(settings.suites)}")


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    known("--dtype", [name], dtypes)
    return dtypes[name]


def _write(result: Result, out: Path) -> list[Path]:
    from ia3rt.bench.report import write_html
    from ia3rt.bench.result import write_csv, write_json

    stem = f"bench-{datetime.now(timezone.utc):%Y-%m-%d-%H%M%S}"
    files = [out / f"{stem}.{ending}" for ending in ("json", "csv", "html")]
    for write, file in zip((write_json, write_csv, write_html), files, strict=True):
        write(result, file)
    return files


def _keeps(console: Console, result: Result, rules: Any) -> bool:
    from ia3rt.bench.budget import check

    broken, idle = check(result, rules)
    for rule in idle:
        console.print(Text(f"budget: not measured: {rule.suite}: {rule.case}: {rule.contender}", style="dim"))
    for each in broken:
        console.print(Text(f"budget: broken: {each}", style="red"), soft_wrap=True)
    if len(idle) == len(rules):
        console.print(Text("budget: broken: none of its rules was measured", style="red"))
        return False
    if not broken:
        console.print(Text(f"budget: {len(rules) - len(idle)} of {len(rules)} rules measured, all kept", style="green"))
    return not broken


def _ours_failed(result: Result) -> bool:
    from ia3rt.bench.contenders.registry import CONTENDERS, OURS

    # What is no contender is a kernel's way, or a whole case.
    return any(name in OURS or name not in CONTENDERS for case in result.cases for name in case.failed)
