"""One cell of the study's tables: what a model with a combination of adapters answered to a task's texts."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ia3rt.bench.study.splits import Split

Phase = Literal["alone", "tuning", "test", "domain", "defaults", "negate", "analogy", "warning"]

OWN, BASE, JOINT = "routing", "base", "joint"
"""What is compared with, as methods are called: each row its own adapter, none, one trained on all tasks."""


@dataclass(frozen=True)
class Cell:
    """What was answered.

    Attributes:
        model: its name.
        phase: which question it is for.
        adapters: the tasks of the adapters that were combined; none of the base model.
        method: how, or OWN, BASE or JOINT.
        values: the method's options.
        seed: of the adapters.
        task: what was asked.
        split: of which texts.
        predicted: the label of each text, in the order of the split, as a digit.
        right: whether that is the text's, as 0 or 1.
    """

    model: str
    phase: Phase
    adapters: tuple[str, ...]
    method: str
    values: Mapping[str, float]
    seed: int
    task: str
    split: Split
    predicted: str
    right: str

    @property
    def accuracy(self) -> float:
        """The share of texts with the right answer."""
        return self.right.count("1") / len(self.right)


_COLUMNS = ("model", "phase", "adapters", "method", "values", "seed", "task", "split", "predicted", "right")


def write_cells(cells: Iterable[Cell], file: Path) -> None:
    """Writes cells as gzipped CSV, the same bytes for the same cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for each in cells:
        adapters, values = "+".join(each.adapters), json.dumps(dict(each.values), sort_keys=True)
        head = (each.model, each.phase, adapters, each.method, values, each.seed)
        writer.writerow((*head, each.task, each.split, each.predicted, each.right))
    with file.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
        packed.write(text.getvalue().encode())


def read_cells(file: Path) -> list[Cell]:
    """What `write_cells` wrote."""
    with gzip.open(file, "rt", encoding="utf-8", newline="") as text:
        return [
            Cell(
                row["model"],
                row["phase"],  # type: ignore[arg-type]
                tuple(row["adapters"].split("+")) if row["adapters"] else (),
                row["method"],
                json.loads(row["values"]),
                int(row["seed"]),
                row["task"],
                row["split"],
                row["predicted"],
                row["right"],
            )
            for row in csv.DictReader(text)
        ]


def write_table(rows: Sequence[Mapping[str, object]], file: Path) -> None:
    """Writes rows as CSV; floats with as many digits as say what they are."""
    with file.open("w", encoding="utf-8", newline="") as text:
        writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{x:.9g}" if isinstance(x, float) else x for name, x in row.items()})


def read_table(file: Path) -> list[dict[str, str]]:
    """What `write_table` wrote, as text."""
    with file.open(encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text))
