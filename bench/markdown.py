"""Tables of a Markdown file that a command writes: each between two comments with its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; all columns but the first are aligned right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def replace(file: Path, name: str, content: str) -> None:
    """Write `content` between the comments `<!-- name -->` and `<!-- end of name -->` of a file.

    Raises:
        ValueError: the file lacks them.

    """
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    text = file.read_text("utf-8")
    changed, count = re.subn(
        re.escape(begin) + ".*?" + re.escape(end), lambda _: begin + content + end, text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{file} has no place for {name}: it lacks the comments {begin.strip()} … {end.strip()}")
    file.write_text(changed, "utf-8")
