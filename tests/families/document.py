"""Writes docs/models.md by checking every family: `python tests/families/document.py`, with diffusers installed."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]
FILE = TESTS.parent / "docs" / "models.md"
if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    import conftest  # noqa: F401  (the kernels in Triton's interpreter, as in the tests)

from families.checks import Report, check  # noqa: E402
from families.family import Family  # noqa: E402
from families.table import FAMILIES  # noqa: E402

START, END = "<!-- families -->", "<!-- /families -->"
HEADER = ("family", "sites without arguments", "kernels", "PEFT's default adapter", "rows", "generate", "merging", "")


def row(name: str, family: Family, report: Report) -> str:
    """The family's line in the table."""
    cls = family.model.rpartition(":")[2]
    cells = (
        f"`{name}` {cls}",
        _sites(report.sites),
        ", ".join(report.kernels),
        report.default or "–",
        report.mixed,
        report.generation or "–",
        report.merged,
        family.remark,
    )
    return f"| {' | '.join(cells)} |"


def _sites(sites: tuple[str, ...]) -> str:
    """By the modules' names; a name that says nothing with the one before it."""
    return ", ".join(dict.fromkeys(map(_named, sites)))


def _named(site: str) -> str:
    path, _, side = site.partition(" ")
    short = re.search(r"experts\.(mlp\.)?[^.]+$|([^.]+\.)?(dense|[0-9]+)$|[^.]+$", path)
    assert short is not None
    return short[0] if side == "(out)" else f"{short[0]} {side}"


def write() -> None:
    """Checks all families, and writes the table."""
    rows = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    for name, family in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(name, family, check(family, Path(folder))))
        print(rows[-1], flush=True)
    before, _, rest = FILE.read_text().partition(START)
    FILE.write_text("\n".join([f"{before}{START}", *rows, f"{END}{rest.partition(END)[2]}"]))


if __name__ == "__main__":
    write()
