"""Where an adapter comes from, in the log and in /v1/models, and what is told of a worker's error."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import pytest
from doors import Doors
from small_adapters import write
from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver

from ia3rt.serving.vllm import register
from ia3rt.serving.vllm.refusals import refusal
from ia3rt.serving.vllm.sentences import sentence_of

BASE = "some/model"


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    register()


@pytest.fixture
def doors(own_store, tmp_path) -> Doors:
    made = Doors(BASE)
    made.models.lora_resolvers = [FilesystemResolver(str(tmp_path / "mine"))]
    return made


@pytest.fixture
def lines(caplog, monkeypatch):
    """What the log says, a line for each."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO)

    def since() -> list[str]:
        said = [record.getMessage() for record in caplog.records if record.name.startswith("vllm.ia3rt")]
        caplog.clear()
        return said

    return since


def cards(doors: Doors) -> dict[str, tuple[str, str | None]]:
    """Each name's root and parent."""
    shown = asyncio.run(doors.models.show_available_models())
    return {card.id: (card.root, card.parent) for card in shown.data}


def test_the_root_is_where_it_was_loaded_from(doors, tmp_path, lines) -> None:
    first, second, third = write(tmp_path / "one"), write(tmp_path / "two", 3.0), write(tmp_path / "three")
    assert doors.load("a", first).status_code == 200
    (line,) = lines()
    assert line.startswith(f"Loaded IA³ adapter 'a' from '{first}': sha256-") and "1 vectors" in line
    assert doors.load("b", third).status_code == 200  # the same numbers, from elsewhere
    assert doors.load("a", second, load_inplace=True).status_code == 200
    assert cards(doors) == {"base": (BASE, None), "a": (str(second), "base"), "b": (str(third), "base")}
    assert doors.load("a", first, load_inplace=True).status_code == 200
    assert cards(doors)["a"] == (str(first), "base")


def test_what_a_resolver_found_too(doors, tmp_path, lines) -> None:
    folder = write(tmp_path / "mine" / "a", base_model_name_or_path=BASE)
    assert doors.check("a") == (200, "")
    assert cards(doors)["a"] == (str(folder), "base")
    assert any(line.startswith(f"Loaded IA³ adapter 'a' from '{folder}'") for line in lines())


def test_a_name_that_a_lora_has_now_shows_the_loras(doors, tmp_path) -> None:
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    assert doors.load("a", write(tmp_path / "a")).status_code == 200
    assert doors.load("a", lora, load_inplace=True).status_code == 200
    assert cards(doors)["a"] == (str(lora), "base")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a\nINFO all is well", "{good}"),
        ("a\x1b[31m", "{good}"),
        ("a", "/no\nINFO all is well"),
        ("a*b", "{good}"),
        ("x" * 10_000, "/no/" + "y" * 3_000),
        ("a", "{wide}"),
    ],
)
def test_a_refusal_is_one_short_line(doors, tmp_path, lines, name, path) -> None:
    good, wide = write(tmp_path / "good"), write(tmp_path / "wide", width=9)
    assert doors.load(name, path.format(good=good, wide=wide)).status_code >= 400
    (line,) = lines()
    assert "is not loaded" in line and line.isprintable() and len(line) < 700, line
    assert set(cards(doors)) == {"base"}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Call to add_lora method failed: it is too wide", "it is too wide"),
        (
            "Call to add_lora method failed: Worker failed with error 'adapter 'a' is too wide', please check "
            "the stack trace above for the root cause",
            "adapter 'a' is too wide",
        ),
        ("Worker failed with error 'two\nlines', please check the stack trace above for the root cause", "two\nlines"),
        ("it says: Worker failed with error 'x'", "it says: Worker failed with error 'x'"),
    ],
)
def test_a_workers_sentence_alone(message, said) -> None:
    assert sentence_of(Exception(message)) == said.splitlines()[0]
    told = refusal(Exception(message), "a").error.message
    assert said.splitlines()[0] in told and "stack trace" not in told


def test_what_cannot_be_loaded_at_the_start_ends_it_with_a_sentence(doors, tmp_path, capsys) -> None:
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath

    for name, path, told in (
        ("a", write(tmp_path / "wide", width=9), "4 wide"),
        ("a*b", write(tmp_path / "good"), "means a mix"),
        ("base", tmp_path / "good", "conflicts with a served base model"),
        ("c", tmp_path / "missing", "is not there"),
        ("twice", tmp_path / "good", "has already been loaded"),
    ):
        named = [LoRAModulePath(name=name, path=str(path))]
        doors.models.static_lora_modules = named * (2 if name == "twice" else 1)
        with pytest.raises(SystemExit) as ended:
            asyncio.run(doors.models.init_static_loras())
        said = capsys.readouterr().err
        (line,) = (line for line in said.splitlines() if line.startswith("Error: "))
        assert ended.value.code == 1 and told in line and "Traceback" not in said, said


def test_the_folder_of_an_adapter_stays_where_it_was_refused(doors, tmp_path) -> None:
    """A refused load in place leaves what was there, and what /v1/models says of it."""
    good: Path = write(tmp_path / "good")
    assert doors.load("a", good).status_code == 200
    assert doors.load("a", write(tmp_path / "wide", width=9), load_inplace=True).status_code == 400
    assert cards(doors)["a"] == (str(good), "base")
