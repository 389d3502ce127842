"""What happens to stored copies while a server runs, at vLLM's own doors: right numbers, or a refusal; never others."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from doors import Doors
from small_adapters import write

from ia3rt.serving.settings import STORE_GB
from ia3rt.serving.vllm import keeping, register
from ia3rt.serving.vllm.source import Source

NUMBERS = "adapter_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    register()


@pytest.fixture
def doors(own_store, tmp_path) -> Doors:
    made = Doors()
    assert made.load("a", write(tmp_path / "a", 2.0)).status_code == 200
    return made


def numbers(doors: Doors, name: str) -> list[float]:
    """What a worker that reads the adapter now makes of it."""
    request = doors.models.lora_requests[name]
    (vector,) = Source.of(request.lora_path, name).vectors().values()
    return vector.tolist()


def copy_of(doors: Doors, name: str) -> Path:
    return Path(doors.models.lora_requests[name].lora_path)


def _other_numbers(copy: Path) -> None:
    write(copy, 5.0)


def _same_size_and_time(copy: Path) -> None:
    file = copy / NUMBERS
    found = os.stat(file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


HAPPENINGS = {
    "gone": lambda copy: shutil.rmtree(copy),
    "the store gone": lambda copy: shutil.rmtree(copy.parent),
    "a file gone": lambda copy: (copy / NUMBERS).unlink(),
    "cut": lambda copy: os.truncate(copy / NUMBERS, 40),
    "empty": lambda copy: os.truncate(copy / NUMBERS, 0),
    "other numbers": _other_numbers,
    "one bit": _same_size_and_time,
    "a pipe": lambda copy: ((copy / NUMBERS).unlink(), os.mkfifo(copy / NUMBERS)),
    "a folder": lambda copy: ((copy / NUMBERS).unlink(), (copy / NUMBERS / "x").mkdir(parents=True)),
    "a file instead": lambda copy: (shutil.rmtree(copy), copy.write_text("x")),
    "a link to nowhere": lambda copy: (shutil.rmtree(copy), copy.symlink_to("/nowhere")),
}


@pytest.mark.parametrize("happening", HAPPENINGS)
def test_a_request_finds_the_copy_written_anew(doors, happening) -> None:
    copy = copy_of(doors, "a")
    HAPPENINGS[happening](copy)
    with pytest.raises(ValueError, match="damaged or gone"):  # a worker never takes it for the adapter
        numbers(doors, "a")
    assert doors.check("a") == (200, "") and numbers(doors, "a") == [2.0] * 4


@pytest.mark.parametrize("happening", HAPPENINGS)
def test_a_load_finds_the_copy_written_anew(doors, happening, tmp_path) -> None:
    """So does a server that starts."""
    HAPPENINGS[happening](copy_of(doors, "a"))
    keeping.keeping.cache_clear()
    again = Doors()
    assert again.load("a", tmp_path / "a").status_code == 200 and numbers(again, "a") == [2.0] * 4


@pytest.mark.parametrize("original", ["gone", "changed", "damaged"])
def test_without_the_original_the_request_is_refused_and_others_are_served(doors, original, tmp_path) -> None:
    assert doors.load("b", write(tmp_path / "b", 3.0)).status_code == 200
    copy = copy_of(doors, "a")
    if original == "gone":
        shutil.rmtree(tmp_path / "a")
    elif original == "changed":
        write(tmp_path / "a", 7.0)
    else:
        os.truncate(tmp_path / "a" / NUMBERS, 10)
    assert doors.check("a") == (200, "")  # the copy is all that it takes
    shutil.rmtree(copy)
    for name in ("a", "a*b", "mix:a*0.5+b*0.5"):
        status, told = doors.check(name)
        assert status == 503 and "'a'" in told and "load the adapter again" in told
    assert doors.check("b") == (200, "") and numbers(doors, "b") == [3.0] * 4
    write(tmp_path / "a", 2.0)
    assert doors.check("a") == (200, "") and numbers(doors, "a") == [2.0] * 4


def test_past_its_limit_the_store_loses_what_was_used_least_recently(doors, tmp_path, monkeypatch) -> None:
    size = sum(file.stat().st_size for file in copy_of(doors, "a").iterdir())
    monkeypatch.setenv(STORE_GB, str(3.5 * size / 1e9))
    copies = []
    for number in range(6):
        name = f"n{number}"
        assert doors.load(name, write(tmp_path / name, 10.0 + number)).status_code == 200
        copies.append(copy_of(doors, name))
        os.utime(copies[-1], (number, number))
        doors.unload(name)
    assert copy_of(doors, "a").is_dir()  # loaded, and so it stays, however long ago it was used
    left = [copy for copy in copies if copy.is_dir()]
    assert left == copies[-2:]
    assert doors.check("a") == (200, "")


def test_a_copy_that_another_server_has_loaded_stays(doors, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(STORE_GB, "1e-9")
    keeping.keeping.cache_clear()
    other = Doors()
    assert other.load("b", write(tmp_path / "b", 3.0)).status_code == 200
    assert copy_of(doors, "a").is_dir() and copy_of(other, "b").is_dir()


def test_what_is_loaded_is_not_another_adapters_leftover(doors, tmp_path) -> None:
    """An adapter that the model refuses has the numbers of one that is loaded; that one's copy stays."""
    refused = doors.load("a2", write(tmp_path / "wide", 2.0, width=9))
    assert refused.status_code == 400 and copy_of(doors, "a").is_dir()

    async def refuse(request: object) -> bool:
        raise ValueError("no room")

    doors.engine.add_lora = refuse
    assert doors.load("a3", tmp_path / "a").status_code == 400 and copy_of(doors, "a").is_dir()


def test_a_copy_that_goes_as_soon_as_it_is_stored_is_missed(tmp_path, monkeypatch) -> None:
    def stored_and_gone(*arguments: object) -> Path:
        folder = stored(*arguments)
        shutil.rmtree(folder)
        return folder

    stored = keeping.store
    kept = keeping.Keeping(tmp_path / "store")
    monkeypatch.setattr(keeping, "store", stored_and_gone)
    folder = kept.store(str(write(tmp_path / "a")), "a")
    assert not kept.is_as_it_was(folder)
    monkeypatch.setattr(keeping, "store", stored)
    kept.mend(folder, "a")
    assert kept.is_as_it_was(folder) and folder.is_dir()
