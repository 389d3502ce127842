"""Files that are none, or are endless, at vLLM's own doors: each answer is ours, is 4xx, and the next load works."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from doors import Doors
from small_adapters import write

from ia3rt.serving.vllm import loading, register, store

CONFIG, NUMBERS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
SPARSE = 3 << 30


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    register()


@pytest.fixture
def doors(own_store) -> Doors:
    return Doors()


def _pipe(name: str):
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def _socket(folder: Path) -> None:
    (folder / CONFIG).unlink()
    here = Path.cwd()
    os.chdir(folder)  # a socket's path is short
    socket.socket(socket.AF_UNIX).bind(CONFIG)
    os.chdir(here)


def _link(name: str, to: str):
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)

    return change


def _text(text: bytes):
    return lambda folder: (folder / CONFIG).write_bytes(text)


def _sparse(name: str):
    return lambda folder: os.truncate(folder / name, SPARSE)


def _header(entries: object, numbers: int = 0):
    def change(folder: Path) -> None:
        header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
        (folder / NUMBERS).write_bytes(struct.pack("<Q", len(header)) + header)
        os.truncate(folder / NUMBERS, 8 + len(header) + numbers)

    return change


def _vector(shape: list[object], end: object, dtype: str = "F32") -> dict[str, object]:
    return {"fc.ia3_l": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


def _bomb(folder: Path) -> None:
    """An archive of some kilobytes that unpacks to hundreds of megabytes."""
    (folder / NUMBERS).unlink()
    torch.save({"fc.ia3_l": torch.zeros(1, 1 << 26)}, folder / "plain.bin")
    with zipfile.ZipFile(folder / "plain.bin") as plain, zipfile.ZipFile(folder / PICKLE, "w", 8) as packed:
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))
    (folder / "plain.bin").unlink()


def _view(folder: Path) -> None:
    """Sixteen thousand million numbers, all of them the same one."""
    (folder / NUMBERS).unlink()
    torch.save({"fc.ia3_l": torch.ones(1).expand(1, 1 << 34)}, folder / PICKLE)


ATTACKS = {
    "a pipe as the config": (_pipe(CONFIG), "a pipe"),
    "a pipe as the numbers": (_pipe(NUMBERS), "a pipe"),
    "a pipe as the numbers of a LoRA": (
        lambda folder: (_text(b'{"peft_type": "LORA", "r": 8}')(folder), _pipe(PICKLE)(folder)),
        "a pipe",
    ),
    "a pipe as what only vLLM reads": (
        lambda folder: (_text(b'{"peft_type": "LORA", "r": 8}')(folder), _pipe("adapter_model.pt")(folder)),
        "a pipe",
    ),
    "a socket": (_socket, "a socket"),
    "an endless device": (_link(CONFIG, "/dev/zero"), "a device"),
    "a device as the numbers": (_link(NUMBERS, "/dev/zero"), "a device"),
    "links in a circle": (_link(CONFIG, CONFIG), "levels of symbolic links"),
    "a folder as the numbers": (lambda folder: ((folder / NUMBERS).unlink(), (folder / NUMBERS).mkdir()), "a folder"),
    "a sparse config": (_sparse(CONFIG), "too large"),
    "sparse numbers": (_sparse(NUMBERS), "server reads"),
    "a sparse vector": (_header(_vector([1, SPARSE // 4], SPARSE), SPARSE), "server reads"),
    "a long header": (lambda folder: (folder / NUMBERS).write_bytes(struct.pack("<Q", 99_000_000)), "header"),
    "a deep header": (_header(b"[" * 100_000), "header is broken"),
    "a header that is a list": (_header([1]), "header is broken"),
    "a shape below nothing": (_header(_vector([1, -4], 16), 16), "header is broken"),
    "a shape of text": (_header(_vector(["1", "4"], 16), 16), "header is broken"),
    "a shape that overflows": (_header(_vector([1 << 61, 1 << 61], 16), 16), "bytes of numbers"),
    "numbers of no dtype": (_header(_vector([1, 4], 16, "Q9"), 16), "Q9"),
    "whole numbers": (_header(_vector([1, 4], 16, "I32"), 16), "int32"),
    "more than its numbers": (_header(_vector([1, 4], 16), 17), "goes on after"),
    "a long key": (_header({"k" * 600 + ".ia3_l": _vector([1, 4], 16)["fc.ia3_l"]}, 16), "606 characters"),
    "another method's numbers": (
        _header({"fc.lora_A.weight": {"dtype": "F32", "shape": [8, 1 << 24], "data_offsets": [0, 1 << 29]}}, 1 << 29),
        "server reads",
    ),
    "an archive that unpacks": (_bomb, "compressed"),
    "a view of one number": (_view, "server reads"),
    "no JSON": (_text(b"{"), "damaged"),
    "nothing": (_text(b""), "empty"),
    "deep JSON": (_text(b"[" * 200_000), "damaged"),
    "JSON that is a number": (_text(b"7"), "damaged"),
    "a number of many digits": (_text(b'{"r": ' + b"9" * 10_000 + b"}"), "damaged"),
    "no text": (_text(b"\xff\xfe\x00"), "damaged"),
    "modules that are a number": (_text(b'{"peft_type": "IA3", "modules_to_save": 5}'), "modules_to_save"),
    "a million modules": (
        _text(json.dumps({"peft_type": "IA3", "modules_to_save": ["a"] * 200_000}).encode()),
        "200,000",
    ),
    "AdapterHub's alpha in words": (
        lambda folder: (
            _text(b'{"config": {"composition_mode": "scale", "alpha": "much"}}')(folder),
            torch.save({"fc.loras.a.lora_B": torch.ones(4, 1)}, folder / "pytorch_adapter.bin"),
        ),
        "alpha",
    ),
}
"""What is done to a good adapter, and what the answer says."""


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_file_that_is_none_is_refused_at_once(doors, tmp_path, attack) -> None:
    change, told = ATTACKS[attack]
    bad, good = write(tmp_path / "bad"), write(tmp_path / "good")
    change(bad)
    start = time.perf_counter()
    response = doors.load("bad", bad)
    assert time.perf_counter() - start < 10
    message = response.json()["error"]["message"]
    assert 400 <= response.status_code < 500 and told in message and "'bad'" in message, response.text
    assert doors.engine.asked == [] and not doors.models.lora_requests
    assert doors.load("good", good).status_code == 200
    assert len(list((tmp_path / "cache/ia3rt/adapters").iterdir())) == 1


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/no/such/folder", 404),
        ("no/such", 404),
        ("no such thing", 404),
        ("a" * 300, 404),
        ("/" + "a/" * 2_500, 400),
        ("/a\0b", 400),
        ("\ud800", 400),
        ("~nobody-by-this-name/x", 404),
        ("/etc/passwd", 404),
        ("/", 404),
        ("\n", 400),
        ("ia3rt-mix:{}", 400),
    ],
)
def test_a_path_that_is_none_is_refused(doors, path, status) -> None:
    response = doors.load("x", path)
    message = response.json()["error"]["message"]
    assert response.status_code == status and "\n" not in message, response.text
    assert doors.engine.asked == []


def test_a_byte_order_mark_is_read_over(doors, tmp_path) -> None:
    folder = write(tmp_path / "a")
    (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes())
    assert doors.load("a", folder).status_code == 200


@pytest.mark.parametrize(
    "keys",
    [("base_model.model.fc", "fc"), ("fc", "_orig_mod.fc"), ("base_model.model.fc", "base_model.model._orig_mod.fc")],
)
def test_two_keys_for_one_module_are_refused(doors, tmp_path, keys) -> None:
    response = doors.load("a", write(tmp_path / "a", keys=keys))
    assert response.status_code == 400 and "mean the same" in response.json()["error"]["message"]


def test_what_the_model_refuses_is_not_kept(doors, tmp_path) -> None:
    for number in range(20):
        response = doors.load("wide", write(tmp_path / "wide", float(number), width=9))
        assert response.status_code == 400 and "4 wide" in response.json()["error"]["message"]
    assert list((tmp_path / "cache/ia3rt/adapters").iterdir()) == []
    kept = write(tmp_path / "a")
    assert doors.load("a", kept).status_code == 200
    doors.engine.model_config = None
    assert len(list((tmp_path / "cache/ia3rt/adapters").iterdir())) == 1


def test_a_full_disk_is_the_servers_fault(doors, tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store, "_write_through", full)
        response = doors.load("a", write(tmp_path / "a"))
    assert response.status_code == 507 and "full" in response.json()["error"]["message"]
    assert list((tmp_path / "cache/ia3rt/adapters").iterdir()) == []
    assert doors.load("a", tmp_path / "a").status_code == 200


def test_a_disk_that_does_not_answer_holds_up_nobody_for_ever(doors, tmp_path, monkeypatch) -> None:
    release = False

    def hang() -> None:
        while not release:
            time.sleep(0.01)

    async def all_at_once() -> tuple[list[object], float]:
        stuck = [asyncio.ensure_future(loading.apart(hang)) for _ in range(loading.AT_ONCE)]
        await asyncio.sleep(0.05)
        start = time.perf_counter()
        response = await doors._post({"lora_name": "a", "lora_path": str(write(tmp_path / "a"))})
        return [response, *await asyncio.gather(*stuck, return_exceptions=True)], time.perf_counter() - start

    monkeypatch.setattr(loading, "SECONDS", 0.5)
    try:
        (response, *stuck), seconds = asyncio.run(all_at_once())
    finally:
        release = True
    assert response.status_code == 503 and seconds < 5
    assert all(isinstance(error, loading.SlowLoadError) for error in stuck)
    monkeypatch.undo()
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    assert doors.load("a", tmp_path / "a").status_code == 200
