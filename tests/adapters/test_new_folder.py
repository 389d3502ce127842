"""A new folder, or an empty one that stays what it is."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from ia3rt.adapters import new_folder as module
from ia3rt.adapters.new_folder import check_new, new_folder, replacing


def fill(folder: Path) -> None:
    (folder / "config.json").write_text("last")
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text("deep")
    (folder / "weights").write_text("first")


def contents(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*"))


FILLED = ["config.json", "inner", "inner/file", "weights"]


def test_an_empty_folder_stays_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there"
    there.mkdir(mode=0o750)
    before = there.stat()
    monkeypatch.chdir(there)  # what it is for a shell
    with new_folder(".") as folder:
        assert contents(tmp_path)[0] == "there" and folder.is_relative_to(there), "nothing is written beside it"
        fill(folder)
    assert os.listdir() and contents(there) == FILLED
    assert (there.stat().st_ino, there.stat().st_mode) == (before.st_ino, before.st_mode)


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    with new_folder(tmp_path / "link") as folder:
        fill(folder)
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "there") == FILLED


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_an_empty_folder_needs_no_other_to_be_written(tmp_path: Path) -> None:
    (tmp_path / "parent" / "there").mkdir(parents=True)
    (tmp_path / "parent").chmod(0o500)
    try:
        with new_folder(tmp_path / "parent" / "there") as folder:
            fill(folder)
    finally:
        (tmp_path / "parent").chmod(0o700)
    assert contents(tmp_path / "parent" / "there") == FILLED


def test_the_config_comes_last_and_a_failure_leaves_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = []

    def fails_at_last(old: Path, new: Path) -> None:
        moved.append(new.name)
        if new.name == "config.json":
            raise OSError("broken")
        os.replace(old, new)

    monkeypatch.setattr(module.os, "rename", fails_at_last)
    with pytest.raises(OSError, match="broken"), new_folder(tmp_path) as folder:
        fill(folder)
    assert moved == ["inner", "weights", "config.json"] and not contents(tmp_path)


def test_what_came_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="no longer empty"), new_folder(tmp_path) as folder:
        fill(folder)
        (tmp_path / "weights").write_text("another's")
    assert contents(tmp_path) == ["weights"] and (tmp_path / "weights").read_text() == "another's"


@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_is_an_oserror_and_leaves_nothing(there: bool, tmp_path: Path) -> None:
    path = tmp_path if there else tmp_path / "new"
    with pytest.raises(OSError, match="cannot write .*No space"), new_folder(path) as folder:
        fill(folder)
        raise SafetensorError("Error: No space left on device")
    assert not contents(tmp_path)


def test_a_path_that_cannot_be_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="/file is a file: name another folder"):
        check_new(tmp_path / "file" / "x" / "y")
    with pytest.raises(OSError, match="name too long"):
        check_new(tmp_path / ("n" * 300))
    longest = tmp_path / ("n" * 255)
    with new_folder(longest) as folder:
        fill(folder)
    assert contents(longest) == FILLED


def write_two(folder: Path) -> None:
    with replacing(folder) as written:
        for name in ("adapter_config.json", "weights"):
            (written / name).write_text("new")


def test_files_are_replaced_and_others_stay(tmp_path: Path) -> None:
    write_two(tmp_path / "a" / "b")
    assert contents(tmp_path / "a" / "b") == ["adapter_config.json", "weights"]
    (tmp_path / "a" / "b" / "weights").write_text("old")
    (tmp_path / "a" / "b" / "notes").write_text("mine")
    write_two(tmp_path / "a" / "b")
    read = {file.name: file.read_text() for file in (tmp_path / "a" / "b").iterdir()}
    assert read == {"adapter_config.json": "new", "weights": "new", "notes": "mine"}


@pytest.mark.parametrize("there", [["adapter_config.json", "weights"], ["adapter_config.json"], []])
@pytest.mark.parametrize("step", range(2))
@pytest.mark.parametrize("links", [True, False])
def test_replacing_that_fails_at_any_step_changes_nothing(
    links: bool, step: int, there: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in there:
        (tmp_path / name).write_text(f"old {name}")
    steps, rename = iter(range(2)), os.rename
    if not links:
        monkeypatch.setattr(module.os, "link", lambda *_, **__: rename(tmp_path / "none", tmp_path / "none"))

    def fails_once(old: Path, new: Path) -> None:
        assert [(tmp_path / name).exists() for name in there] == [True] * len(there), "who reads finds one of them"
        if next(steps) == step:
            raise OSError(errno.ENOSPC, "broken")
        rename(old, new)

    monkeypatch.setattr(module.os, "rename", fails_once)
    with pytest.raises(OSError, match="where nothing has changed: .*broken"):
        write_two(tmp_path)
    assert contents(tmp_path) == there
    assert [(tmp_path / name).read_text() for name in there] == [f"old {name}" for name in there]


def test_replacing_that_is_not_begun_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space"), replacing(tmp_path / "a" / "b"):
        raise SafetensorError("Error: No space left on device")
    assert not contents(tmp_path)
    inside = new_folder(tmp_path / "c")
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/c: No space$"), inside as folder, replacing(folder):
        raise SafetensorError("No space")
    (tmp_path / "weights").mkdir()
    with pytest.raises(OSError, match="weights is a folder"):
        write_two(tmp_path)
    assert contents(tmp_path) == ["weights"]
