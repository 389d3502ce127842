"""Runs the command line within the test's process, and checks how it ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from ia3rt.cli.main import app


def run(*arguments: str | Path) -> Result:
    # Wide, so that no message is broken into lines.
    return CliRunner(env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"}).invoke(app, [str(a) for a in arguments])


def done(*arguments: str | Path) -> dict[str, Any]:
    """What a command that ends well says with --json."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    said: dict[str, Any] = json.loads(result.stdout)
    return said


def fails(result: Result, code: int, *parts: str) -> None:
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert any(all(part in line for part in parts) for line in result.output.splitlines()), result.output
