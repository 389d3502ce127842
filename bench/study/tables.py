"""The page's tables, from the study's CSV files alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ia3rt.bench import markdown, readable
from ia3rt.bench.study.cells import BASE, JOINT, OWN, read_table
from ia3rt.bench.study.methods import IN_A_ROW
from ia3rt.bench.study.models import MODELS
from ia3rt.bench.study.summary import FEATURES

Row = Mapping[str, str]

SIGNIFICANT = 0.05
TITLES = {kind.name: kind.title for kind in MODELS}
WORDS = {OWN: "routing: each row its own adapter", JOINT: "one adapter trained on all tasks", BASE: "no adapter"}
_SIZES = {2: "two", 3: "three"}
_FEATURES = {
    "cosine": "cosine of the two l − 1",
    "same_sign": "share of numbers with the same sign",
    "distance": "mean \\|l − 1\\| of both",
    "larger_distance": "mean \\|l − 1\\|, the larger",
}


def tables(folder: Path) -> dict[str, str]:
    """The content of each place on the page, by the place's name."""
    made: dict[str, Callable[[Path], str]] = {
        "study run": _run,
        "study kept": _kept,
        "study points": _points,
        "study tasks": _tasks,
        "study values": _values,
        "study defaults": _defaults,
        "study domains": _domains,
        "study correlations": _correlations,
        "study forgetting": _forgetting,
        "study analogy": _analogy,
        "study warning": _warning,
        "study checks": _checks,
    }
    return {name: make(folder) for name, make in made.items()}


def rows_of(folder: Path, table: str) -> dict[str, list[Row]]:
    """A table's rows by model, in the order of the file."""
    by_model: dict[str, list[Row]] = {}
    for row in read_table(folder / f"{table}.csv"):
        by_model.setdefault(row["model"], []).append(row)
    return by_model


def sizes_of(rows: Sequence[Row]) -> list[int]:
    """How many adapters were combined, smallest first."""
    return sorted({int(row["size"]) for row in rows})


def compared(rows: Sequence[Row], size: int) -> dict[str, Row]:
    """The rows of methods.csv for sets of a size, by method; the adapter of all tasks beside all at once only."""
    is_all = size == sizes_of(rows)[-1]
    return {row["method"]: row for row in rows if int(row["size"]) == size and (row["method"] != JOINT or is_all)}


def is_significant(row: Row, difference: str) -> bool:
    """Whether a difference is one of other texts, by the corrected test, and of other seeds too, by its interval."""
    if not row["p_holm"] or float(row["p_holm"]) >= SIGNIFICANT:
        return False
    return not float(row[f"{difference}_low"]) <= 0 <= float(row[f"{difference}_high"])


def facts(folder: Path) -> dict[str, Any]:
    """What run.json says."""
    read: dict[str, Any] = json.loads((folder / "run.json").read_text("utf-8"))
    return read


def _run(folder: Path) -> str:
    run = facts(folder)
    scale = run["scale"]
    pieces = ", in pieces" if run["pieces"] > 1 else ""
    left = "".join(f" Left out: {name}, as {why}." for name, why in run["left_out"].items())
    asked = (
        f"Run from {run['begun']} to {run['ended']} (UTC){pieces}: {len(scale['seeds'])} seeds, "
        f"{scale['budget']['steps']} steps an adapter, {scale['test']} test texts a task ({scale['test_of_triples']} "
        f"for sets of three), {scale['validation']} for choosing values.{left}"
    )
    ran: str = readable.ran("", run["machine"], run["versions"])
    return f"{asked}\\\n{ran}"


def _kept(folder: Path) -> str:
    def cell(row: Row) -> str:
        return _percent(row, "kept")

    return _by_size(folder, "share kept, %", cell, (OWN, JOINT, BASE))


def shares(folder: Path) -> Table:
    """The shares kept for a terminal, the best with two adapters on top."""
    table = Table("share kept, %", box=None, header_style="bold")
    columns: list[dict[str, Row]] = []
    for model, rows in rows_of(folder, "methods").items():
        for size in sizes_of(rows):
            table.add_column(f"{TITLES.get(model, model)}, {size}", justify="right")
            columns.append({name: row for name, row in compared(rows, size).items() if row["kept"]})
    for name in sorted(columns[0], key=lambda name: -float(columns[0][name]["kept"])):
        numbers = (f"{100 * float(each[name]['kept']):.0f}" if name in each else "" for each in columns)
        table.add_row(WORDS.get(name, name), *numbers)
    return table


def _points(folder: Path) -> str:
    def cell(row: Row) -> str:
        mark = "**" if is_significant(row, "over_product") else ""
        p = f" (p {_p(row['p_holm'])})" if row["p_holm"] else ""
        over = f"{mark}{100 * float(row['over_product']):+.1f}{mark}{p}"
        return f"{over}; {_range(row, 'routing_over')}"

    return _by_size(folder, "points over the product; below routing", cell, (JOINT, BASE))


def _by_size(folder: Path, title: str, cell: Callable[[Row], str], beside: Sequence[str]) -> str:
    written = []
    for model, rows in rows_of(folder, "methods").items():
        sizes = sizes_of(rows)
        found = [compared(rows, size) for size in sizes]
        tested = [name for name in found[0] if name not in WORDS]
        tested.sort(key=lambda name: -float(found[0][name]["accuracy"]))
        shown = [name for name in (OWN, *tested, JOINT, BASE) if name not in WORDS or name in beside]
        header = (f"{TITLES.get(model, model)}: {title}", *_in_words(sizes))
        lines = [
            (WORDS.get(name, f"`{name}`"), *(cell(of_size[name]) if name in of_size else "" for of_size in found))
            for name in shown
        ]
        written.append(_table(header, lines))
    return "\n\n".join(written)


def _tasks(folder: Path) -> str:
    written = []
    for model, rows in rows_of(folder, "tasks").items():
        size = sizes_of(rows)[-1]
        of_size = [row for row in rows if int(row["size"]) == size]
        names = list(dict.fromkeys(row["task"] for row in of_size))
        shown = (OWN, *IN_A_ROW, "power", "ties", JOINT, BASE)
        lines = []
        for method in shown:
            found = {row["task"]: row for row in of_size if row["method"] == method}
            lines.append((WORDS.get(method, f"`{method}`"), *(_percent(found[name], "accuracy") for name in names)))
        written.append(_table((f"{TITLES.get(model, model)}: accuracy, %, all {size} at once", *names), lines))
    return "\n\n".join(written)


def _values(folder: Path) -> str:
    written = []
    for model, rows in rows_of(folder, "methods").items():
        sizes = sizes_of(rows)
        chosen: dict[str, dict[int, str]] = {}
        for row in rows:
            values = json.loads(row["values"]) if row["values"] else {}
            if values:
                said = ", ".join(f"{name} {value:g}" for name, value in values.items())
                chosen.setdefault(row["method"], {})[int(row["size"])] = said
        header = (f"{TITLES.get(model, model)}: chosen", *_in_words(sizes))
        lines = [(f"`{name}`", *(of_size.get(size, "") for size in sizes)) for name, of_size in chosen.items()]
        written.append(_table(header, lines))
    return "\n\n".join(written)


def _defaults(folder: Path) -> str:
    written = []
    for model, rows in rows_of(folder, "defaults").items():
        sizes = sizes_of(rows)
        found = {(row["method"], int(row["size"])): row for row in rows}

        def cell(row: Row) -> str:
            accuracy = " and ".join(f"{100 * float(row[f'accuracy_of_{name}']):.1f}" for name in ("usual", "other"))
            mark = "**" if is_significant(row, "difference") else ""
            value, low, high = _points_of(row, "difference")
            difference = f"{mark}{value:+.1f}{mark} ({low:.1f} … {high:.1f})"
            over, below, above = _points_of(row, "over_product")
            return f"{accuracy}: {difference}, p {_p(row['p_holm'])}; {over:+.1f} ({below:.1f} … {above:.1f})"

        header = (f"{TITLES.get(model, model)}: accuracy, %; the second over the product", *_in_words(sizes))
        lines = []
        for method in dict.fromkeys(row["method"] for row in rows):
            row = found[method, sizes[0]]
            usual, other = (json.loads(row[name]) for name in ("usual", "other"))
            (option,) = (name for name in usual if usual[name] != other[name])
            what = f"`{method}`, {option} {usual[option]:g} and {other[option]:g}"
            lines.append((what, *(cell(found[method, size]) for size in sizes)))
        written.append(_table(header, lines))
    return "\n\n".join(written)


def _domains(folder: Path) -> str:
    written = []
    for model, rows in rows_of(folder, "domain").items():
        names = list(dict.fromkeys(row["task"] for row in rows))
        shown = (OWN, *IN_A_ROW)
        lines = []
        for adapters in dict.fromkeys(row["adapters"] for row in rows):
            for method in shown:
                cells = {r["task"]: r for r in rows if r["adapters"] == adapters and r["method"] == method}
                if cells:
                    how = adapters if method == OWN else f"{adapters.replace('+', ' + ')}, `{method}`"
                    lines.append((how, *(_percent(cells[name], "accuracy") for name in names)))
        header = (f"{TITLES.get(model, model)}: accuracy, %, on", *names)
        written.append(_table(header, lines))
    return "\n\n".join(written)


def _correlations(folder: Path) -> str:
    written = []
    for model, rows in rows_of(folder, "correlations").items():
        outcomes = {f"loss_of_{method}": f"loss of `{method}`" for method in IN_A_ROW}
        found = {(row["feature"], row["outcome"]): row for row in rows}
        lines = [(_FEATURES[name], *(_rho(found[name, outcome]) for outcome in outcomes)) for name in FEATURES]
        header = (f"{TITLES.get(model, model)}: Spearman's ρ over {rows[0]['pairs']} pairs", *outcomes.values())
        written.append(_table(header, lines))
    return "\n\n".join(written)


def _forgetting(folder: Path) -> str:
    written = []
    for model, rows in rows_of(folder, "negate").items():
        names = list(dict.fromkeys(row["task"] for row in rows))
        found = {(row["negated"], row["task"]): row for row in rows}
        lines = [["nothing", *(f"{100 * float(found[name, name]['before']):.0f}" for name in names)]]
        lines += [[target, *(_change(found[target, name]) for name in names)] for target in names]
        header = (f"{TITLES.get(model, model)}: negated", *(f"{name}, %" for name in names))
        written.append(_table(header, lines))
    return "\n\n".join(written)


def _change(row: Row) -> str:
    change, low, high = _points_of(row, "change")
    return f"{change:+.0f} ({low:+.0f} … {high:+.0f})"


def _analogy(folder: Path) -> str:
    written = []
    for model, rows in rows_of(folder, "analogy").items():
        (found,) = rows
        alone = {row["adapters"]: row for row in rows_of(folder, "domain")[model] if row["task"] == found["task"]}
        lines = [
            (f"the analogy, weight {json.loads(found['values'])['weight']:g} of movie and Amazon texts", found),
            ("the movie adapter", alone["movie"]),
            ("Amazon's own adapter", alone["amazon"]),
        ]
        header = (f"{TITLES.get(model, model)}, on Amazon's sentiment", "accuracy, %")
        written.append(_table(header, [(words, _percent(row, "accuracy")) for words, row in lines]))
    return "\n\n".join(written) or "No model of this run writes text."


def _warning(folder: Path) -> str:
    lines = [
        (TITLES.get(model, model), row["adapters"].replace("+", " + "), row["task"], _percent(row, "accuracy"))
        for model, rows in rows_of(folder, "warning").items()
        for row in rows
    ]
    return _table(("`linear` with weights [1, 1]", "adapters", "task", "accuracy, %"), lines)


def _checks(folder: Path) -> str:
    lines = []
    curve = read_table(folder / "curve.csv")
    if curve:
        largest = max(abs(float(row["ia3rt"]) - float(row["peft"])) for row in curve)
        said = f"largest difference of the loss in {len(curve)} steps: {largest:.2g}"
        lines.append((f"trained through ia3rt and through PEFT alone, float32: {said}", TITLES[MODELS[0].name]))
    for model, seen in facts(folder)["seen"].items():
        title = TITLES.get(model, model)
        for each in (seen["model"], *seen["vectors"]):
            exact, short = each["right"]
            speed = "" if not any(each["speed"]) else f", {each['speed'][1] / each['speed'][0]:.1f} times as fast"
            said = f"{each['same']} of {each['texts']} answers the same, {short} right instead of {exact}{speed}"
            lines.append((f"{each['what']} instead of float32: {said}", title))
        mixed = seen["mixed"]
        said = f"{mixed['same']} of {mixed['rows']} answers the same, logits differ by {mixed['largest']:.2g} at most"
        lines.append((f"a mixed batch, routed, beside each adapter alone: {said}", title))
    return _table(("what was checked", "model"), lines)


def _in_words(sizes: Sequence[int]) -> list[str]:
    return [_SIZES.get(size, f"all {size}") for size in sizes]


def _points_of(row: Row, name: str) -> list[float]:
    """An estimate and its interval, times 100."""
    return [100 * float(row[f"{name}{end}"]) for end in ("", "_low", "_high")]


def _percent(row: Row, name: str) -> str:
    if not row[name]:
        return "–"
    value, low, high = _points_of(row, name)
    return f"{value:.0f} ({low:.0f} … {high:.0f})"


def _range(row: Row, name: str) -> str:
    value, low, high = _points_of(row, name)
    return f"{value:.1f} ({low:.1f} … {high:.1f})"


def _rho(row: Row) -> str:
    if not row["rho"]:
        return "–"
    return f"{float(row['rho']):.2f} ({float(row['rho_low']):.2f} … {float(row['rho_high']):.2f})"


def _p(p: str) -> str:
    value = float(p)
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    text: str = markdown.table(header, lines)
    return text
