"""`ia3rt serve`: what it tells vLLM, and what it tells its user."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import shlex
import shutil
import socket
from pathlib import Path

import pytest
from tiny import peft_model, tiny_model
from typer.testing import CliRunner

from ia3rt.cli.main import app
from ia3rt.serving import cpu, max_scale
from ia3rt.serving.settings import ALLOW_ADAPTERS, KEY_FOR_ALL, STORE_GB, allowed_folder, is_key_for_all, store_bytes

LOADING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The commands that would have replaced this process, in which vLLM is taken to be installed."""
    commands: list[list[str]] = []
    find = importlib.util.find_spec
    spec = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: spec if name == "vllm" else find(name, *more))
    monkeypatch.setattr(os, "execv", lambda path, command: commands.append(command))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(cpu, "is_cpu_build", lambda: False)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("cache")))
    return commands


def serve(*arguments: object):
    free = [] if "--port" in arguments else ["--port", 0]
    return CliRunner().invoke(app, ["serve", *map(str, [*arguments, *free])])


def values(command: list[str], option: str) -> list[str]:
    rest = command[command.index(option) + 1 :]
    end = next((place for place, value in enumerate(rest) if value.startswith("--")), len(rest))
    return rest[:end]


def modules(command: list[str]) -> dict[str, str]:
    """The adapters' folders, by their names."""
    return {each["name"]: each["path"] for each in map(json.loads, values(command, "--lora-modules"))}


def test_serves_a_folder(started) -> None:
    result = serve("some/model", "--adapters", EXAMPLES, "--port", 8123, "--dtype", "float32", "--enforce-eager")
    assert result.exit_code == 0, result.output
    (command,) = started
    assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "some/model"]
    assert values(command, "--port") == ["8123"] and values(command, "--host") == ["127.0.0.1"]
    names = sorted(folder.name for folder in EXAMPLES.iterdir())
    assert modules(command) == {name: str((EXAMPLES / name).absolute()) for name in names}
    assert values(command, "--lora-target-modules") == ["down_proj", "k_proj", "v_proj"]
    assert values(command, "--max-lora-rank") == ["1"] and values(command, "--max-loras") == [str(len(names))]
    assert command[-3:] == ["--dtype", "float32", "--enforce-eager"]
    assert f'"model": "mix:{names[0]}*0.7+{names[1]}*0.3"' in result.output and "127.0.0.1:8123" in result.output
    assert "230" in result.output  # 57,600 numbers of 4 bytes


def test_the_largest_scale_reaches_the_plugin(started, monkeypatch) -> None:
    """vLLM loads plugins without arguments, in processes that it starts: they read it where these do."""
    monkeypatch.setenv(max_scale.VARIABLE, "7")
    assert serve("some/model", "--adapters", EXAMPLES, "--max-scale", "2.5").exit_code == 0
    assert max_scale.max_scale("float16", os.environ) == 2.5 and len(started) == 1
    for bad in ("0.5", "much", "nan"):
        refused = serve("some/model", "--adapters", EXAMPLES, "--max-scale", bad)
        assert refused.exit_code != 0 and "--max-scale" in refused.output and bad in refused.output
    assert len(started) == 1


def test_loras_too(started, tmp_path) -> None:
    for rank in (4, 20):
        (tmp_path / f"rank{rank}").mkdir()
        config = {"peft_type": "LORA", "r": 4, "rank_pattern": {"k_proj": rank}}
        (tmp_path / f"rank{rank}" / "adapter_config.json").write_text(json.dumps(config))
    peft_model(tiny_model(), "llama", "b").save_pretrained(tmp_path)
    assert serve("m", "--adapters", tmp_path).exit_code == 0
    (command,) = started
    assert values(command, "--max-lora-rank") == ["32"]
    assert "--lora-target-modules" not in command
    assert set(modules(command)) == {"b", "rank20", "rank4"}


def test_adapters_one_folder_deeper_are_named(started, tmp_path) -> None:
    """As PEFT saves an adapter of a name of its own, into a folder of that name."""
    shutil.copytree(EXAMPLES / "author", tmp_path / "author")
    shutil.copytree(EXAMPLES / "author", tmp_path / "legal" / "legal")
    result = serve("m", "--adapters", tmp_path)
    assert result.exit_code == 0 and "Left out, as it lies one folder deeper: 'legal/legal'" in result.output
    assert set(modules(started[0])) == {"author"}


def test_as_many_slots_as_are_asked_for(started) -> None:
    assert serve("m", "--adapters", EXAMPLES, "--max-loras", 200).exit_code == 0
    assert values(started[0], "--max-loras") == ["200"] and int(values(started[0], "--max-cpu-loras")[0]) >= 200


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--adapters", "missing"], "missing is no folder"),
        (["--adapters", "empty"], "holds no adapter"),
        (["--adapters", "deep"], "none of its folders has an adapter_config.json; one folder deeper are 'legal/legal'"),
        (["--adapters", "damaged"], "damaged"),
        (["--adapters", EXAMPLES, "--max-loras", "0"], "one slot"),
        (["--adapters", EXAMPLES, "--allow-adapters", "missing"], "missing is no folder"),
        (["--adapters", EXAMPLES, "--store-gb", "0"], "some room"),
        (["--adapters", EXAMPLES, "--store-gb", "nan"], "some room"),
        (["--adapters", EXAMPLES, "--max-lora-rank=8"], "is set by ia3rt serve"),
        (["--adapters", EXAMPLES, "--max_lora_rank", "8"], "--max-lora-rank is set by ia3rt serve"),
        (["--adapters", EXAMPLES, "--lora-mod", "a=b"], "--lora-modules is set by ia3rt serve"),
        (["--adapters", EXAMPLES, "--api_server_count=2"], "vllm serve"),
        (["--adapters", EXAMPLES, "--served-model-name", "m", "author"], "has the name of the model"),
        (["--adapters", EXAMPLES, "--served_model_name=author"], "has the name of the model"),
        (["--adapters", EXAMPLES / "author"], "is one adapter"),
        (["--adapters", EXAMPLES, "--host", "no.such.host.invalid"], "no server can listen"),
        (["--adapters", EXAMPLES, "--port", "70000"], "65535"),
        (["--adapters", "mixed"], "`a*b` means a mix"),
        (["--adapters", "broken"], "has characters of control"),
        (["--adapters", "ranks"], "rank_pattern"),
        (["--adapters", "rankless"], "a LoRA's r"),
    ],
)
def test_what_cannot_be_served(started, arguments, told, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / "nothing").mkdir(parents=True)
    shutil.copytree(EXAMPLES / "author", tmp_path / "deep" / "legal" / "legal")
    (tmp_path / "damaged" / "a").mkdir(parents=True)
    (tmp_path / "damaged" / "a" / "adapter_config.json").write_text('{"peft_type": "IA3"')
    for folder, name, config in (
        ("mixed", "a*b", {"peft_type": "LORA", "r": 1}),
        ("broken", "a\nb", {"peft_type": "LORA", "r": 1}),
        ("ranks", "a", {"peft_type": "LORA", "r": 1, "rank_pattern": ["q"]}),
        ("rankless", "a", {"peft_type": "LORA"}),
    ):
        (tmp_path / folder / name).mkdir(parents=True)
        (tmp_path / folder / name / "adapter_config.json").write_text(json.dumps(config))
    refused(serve("m", *arguments), told)
    assert started == []


def refused(result, told: str) -> None:
    """One sentence, and no traceback."""
    said = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code in (1, 2) and told in said and isinstance(result.exception, SystemExit), said
    assert "Traceback" not in said


@pytest.mark.parametrize(("model", "told"), [("/no/such/model", "there is nothing"), ("./none", "there is nothing")])
def test_a_model_that_is_not_there(started, model, told) -> None:
    result = serve(model, "--adapters", EXAMPLES)
    assert result.exit_code == 1 and told in " ".join(result.output.split()) and not started


def test_a_folder_without_a_model(started, tmp_path) -> None:
    result = serve(tmp_path, "--adapters", EXAMPLES)
    assert result.exit_code == 1 and "no config.json" in " ".join(result.output.split()) and not started


def test_a_port_that_is_taken(started) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused(serve("m", "--adapters", EXAMPLES, "--port", port), "Address already in use")
    assert started == []
    assert serve("m", "--adapters", EXAMPLES, "--port", port).exit_code == 0


def test_a_store_that_cannot_be_written(started, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "file"))
    refused(serve("m", "--adapters", EXAMPLES), "cannot be written")
    assert started == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (STORE_GB, "much"),
        (STORE_GB, "-1"),
        (KEY_FOR_ALL, "yes"),
        (max_scale.VARIABLE, "0.5"),
        (ALLOW_ADAPTERS, "/no/such/folder"),
    ],
)
def test_a_variable_that_means_nothing(started, monkeypatch, name, value) -> None:
    os.environ[name] = value  # the test's own
    result = serve("m", "--adapters", EXAMPLES)
    refused(result, name)
    assert value in result.output and started == []


def test_names_that_vllms_own_format_would_cut(started, tmp_path) -> None:
    for name in ("c=d", "e,f", 'g"h'):
        peft_model(tiny_model(), "llama", "b").save_pretrained(tmp_path / "made")
        (tmp_path / "made" / "b").rename(tmp_path / name)
    assert serve("m", "--adapters", tmp_path).exit_code == 0
    assert modules(started[0]) == {name: str(tmp_path / name) for name in ("c=d", "e,f", 'g"h')}


def test_what_the_operator_set_stays(started, monkeypatch) -> None:
    """And what is set is shown, with a reason."""
    monkeypatch.setattr(cpu, "is_cpu_build", lambda: True)
    os.environ.update({KEY_FOR_ALL: "0", STORE_GB: "3", cpu.CACHE: "7"})
    os.environ.pop(cpu.BIND, None)
    os.environ[cpu.THREADS] = "5"
    result = serve("m", "--adapters", EXAMPLES)
    assert result.exit_code == 0
    assert (os.environ[KEY_FOR_ALL], os.environ[STORE_GB], os.environ[cpu.CACHE]) == ("0", "3", "7")
    assert (os.environ[cpu.BIND], os.environ[cpu.THREADS]) == ("nobind", "5")
    assert f"{cpu.BIND}=nobind" in result.output and cpu.CACHE not in result.output


def test_lines_to_try_are_a_shells(started, tmp_path) -> None:
    peft_model(tiny_model(), "llama", "b").save_pretrained(tmp_path / "made")
    (tmp_path / "made" / "b").rename(tmp_path / "it's")
    result = serve("m", "--adapters", tmp_path)
    line = next(line for line in result.output.splitlines() if line.startswith("curl"))
    body = shlex.split(line)[-1]
    assert json.loads(body)["model"] == "it's"


def test_what_the_plugin_is_told(started, tmp_path, monkeypatch) -> None:
    for name in (ALLOW_ADAPTERS, STORE_GB, KEY_FOR_ALL, LOADING):
        monkeypatch.delenv(name, raising=False)
    assert serve("m", "--adapters", EXAMPLES).exit_code == 0
    told = os.environ
    assert is_key_for_all(told) and allowed_folder(told) is None and store_bytes(told) == 8e9 and LOADING not in told
    monkeypatch.chdir(tmp_path)
    (tmp_path / "open").mkdir()
    assert serve("m", "--adapters", EXAMPLES, "--allow-adapters", "open", "--store-gb", 0.5).exit_code == 0
    assert allowed_folder(told) == tmp_path / "open" and store_bytes(told) == 5e8 and told[LOADING] == "1"


def test_without_vllm(monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else find(name, *more))
    result = serve("m", "--adapters", EXAMPLES)
    assert result.exit_code == 1 and "pip install 'ia3rt[vllm]'" in result.output
