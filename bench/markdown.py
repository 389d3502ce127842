"""Tables of a Markdown file that a command writes: each between two comments with its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; all columns but the first are aligned right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def check(file: Path, *names: str) -> None:
    """See that a file has a place for each of these tables, before anything is measured for it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it lacks a table's comments, or has them twice.

    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: run this in the repository's folder, or give the file")
    text = file.read_text("utf-8")
    for name in names:
        if len(_place(name).findall(text)) != 1:
            begin, end = _comments(name)
            raise ValueError(f"{file} has no place for {name}: it lacks the comments {begin} … {end}")


def replace(file: Path, name: str, content: str) -> None:
    """Write `content` between the comments `<!-- name -->` and `<!-- end of name -->` of a file.

    Raises:
        FileNotFoundError: as `check`.
        ValueError: as `check`.

    """
    check(file, name)
    begin, end = _comments(name)
    written = _place(name).sub(lambda _: f"{begin}\n{content}\n{end}", file.read_text("utf-8"))
    file.write_text(written, "utf-8")


def _comments(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- end of {name} -->"


def _place(name: str) -> re.Pattern[str]:
    begin, end = map(re.escape, _comments(name))
    return re.compile(f"{begin}\n.*?\n{end}", re.DOTALL)
