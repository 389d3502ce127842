"""The unit and the compose file of examples/serving: systemd and compose read them, and they start our command."""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from ia3rt.cli.main import app

HERE = Path(__file__).parents[2] / "examples" / "serving"


def check_command(command: list[str]) -> None:
    """Every option is our command's: what it does not know it hands to vLLM, also what is misspelt."""
    assert command[:2] == ["ia3rt", "serve"]
    serve = typer.main.get_command(app).commands["serve"]
    with serve.make_context("serve", list(command[2:])) as context:
        assert context.args == [] and context.params["model"] and context.params["adapters"]


def test_the_compose_file() -> None:
    service = yaml.safe_load((HERE / "compose.yaml").read_text())["services"]["ia3rt"]
    check_command(service["command"])
    inside = {volume.rsplit(":", 2 if volume.endswith(":ro") else 1)[1] for volume in service["volumes"]}
    assert inside == {"/model", "/adapters", "/state"}
    assert service["environment"]["VLLM_CACHE_ROOT"].startswith("/state")
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["command"][-1] == service["ports"][0].rpartition(":")[2] and ":8000/health" in str(
        service["healthcheck"]
    )


def test_the_unit(tmp_path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(HERE / "ia3rt.service")
    path, *options = shlex.split(unit["Service"]["ExecStart"])
    check_command([Path(path).name, *options])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_reads_the_unit(tmp_path) -> None:
    text = (HERE / "ia3rt.service").read_text().replace("/opt/ia3rt/bin/ia3rt", "/bin/true")
    for name, lines, told in (
        ("good", text, ""),
        ("bad", text.replace("KillMode=mixed", "KillMode=mixd"), "kill mode"),
    ):
        (tmp_path / f"{name}.service").write_text(lines)
        done = subprocess.run(
            ["systemd-analyze", "verify", tmp_path / f"{name}.service"], capture_output=True, text=True
        )
        said = [line for line in done.stderr.splitlines() if f"{name}.service" in line]
        assert told in str(said) and bool(said) == bool(told), done.stderr
