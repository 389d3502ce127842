"""A new folder, or an empty one that stays what it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from ia3rt.adapters import new_folder as module
from ia3rt.adapters.new_folder import check_new, new_folder


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
