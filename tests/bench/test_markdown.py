"""The commands that write tables into documents look at these before they measure."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ia3rt.bench import __main__ as commands
from ia3rt.bench import markdown

NOT_MEASURED = {
    "document": "ia3rt.bench.document.compiled_facts",
    "profile": "ia3rt.bench.profile.document.launches",
    "launching": "ia3rt.bench.profile.document.host_times",
    "calling": "ia3rt.bench.profile.document.call_times",
    "recorded": "ia3rt.bench.recorded.write_kernels",
}


@pytest.mark.parametrize("has_file", [False, True])
@pytest.mark.parametrize("command", NOT_MEASURED)
def test_a_document_without_a_place_is_told_in_a_line(command, has_file, tmp_path, monkeypatch) -> None:
    def measure(*_: object) -> None:
        raise AssertionError(f"{command} measures first")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(NOT_MEASURED[command], measure)
    if has_file:
        Path("docs").mkdir()
        for name in ("kernels", "performance"):
            Path(f"docs/{name}.md").write_text("# Nothing\n")
    done = CliRunner().invoke(commands.app, [command], env={"COLUMNS": "200"})
    told = "has no place for" if has_file else "is not there: run this in the repository's folder"
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.output
    assert told in done.output and len(done.output.splitlines()) == 1


def test_only_what_stands_between_the_comments_is_written(tmp_path) -> None:
    file = tmp_path / "a.md"
    file.write_text("# A\n<!-- a -->\nold\n<!-- end of a -->\n<!-- b -->\nold\n<!-- end of b -->\n")
    markdown.replace(file, "b", r"new \1")
    assert file.read_text() == "# A\n<!-- a -->\nold\n<!-- end of a -->\n<!-- b -->\nnew \\1\n<!-- end of b -->\n"
