"""The store of adapters by content."""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from small_adapters import write
from typer.testing import CliRunner

from ia3rt.adapters.checkpoint import read_checkpoint
from ia3rt.cli.main import app
from ia3rt.serving.vllm.cleaning import copies, sweep
from ia3rt.serving.vllm.store import Held, discard, read_stored, store


def test_the_same_content_is_stored_once(tmp_path) -> None:
    root = tmp_path / "store"
    first, second = write(tmp_path / "a", 2.0), write(tmp_path / "b", 2.0)
    stored = store(first, root)
    assert store(second, root) == stored and stored.parent == root
    assert store(write(first, 3.0), root) != stored
    assert {child.name[0] != "." for child in root.iterdir()} == {True} and len(list(root.iterdir())) == 2
    assert read_checkpoint(stored).vectors["fc", "in"].flatten().tolist() == [2.0] * 4
    assert store(stored, root) == stored


def test_what_is_stored_outlives_its_source(tmp_path) -> None:
    source = write(tmp_path / "a", 2.0)
    stored = store(source, tmp_path / "store")
    write(source, 5.0)
    assert read_checkpoint(stored).vectors["fc", "in"].flatten().tolist() == [2.0] * 4


def test_a_damaged_adapter_is_not_stored(tmp_path) -> None:
    source = write(tmp_path / "a", 2.0)
    (source / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="damaged"):
        store(source, tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []
    with pytest.raises(ValueError, match="LORA"):
        store(write(tmp_path / "b", 2.0, peft_type="LORA"), tmp_path / "store")


def test_many_at_once(tmp_path) -> None:
    source = write(tmp_path / "a", 2.0)
    with ThreadPoolExecutor(8) as pool:
        stored = set(pool.map(lambda _: store(source, tmp_path / "store"), range(32)))
    assert len(stored) == 1 and [child.name[0] for child in (tmp_path / "store").iterdir()] != ["."]
    assert len(list((tmp_path / "store").iterdir())) == 1


def test_a_copy_is_the_vectors_and_nothing_else(tmp_path) -> None:
    """Whatever the original is: what a worker reads again and again is small, and its name says what it holds."""
    source = write(tmp_path / "a", 2.0, base_model_name_or_path="m", note="x" * 3_000_000)
    stored = store(source, tmp_path / "store")
    assert sum(file.stat().st_size for file in stored.iterdir()) < 1_000
    assert read_stored(stored)["fc", "in"].flatten().tolist() == [2.0] * 4
    assert read_checkpoint(stored).config["base_model_name_or_path"] == "m"


KILLED = """
import sys, time
from pathlib import Path
from ia3rt.serving.vllm import store
written = store._write_through
def slow(file, content):
    written(file, content)
    print("begun", flush=True)
    time.sleep(60)
store._write_through = slow
store.store(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_what_a_kill_left_half_written_goes_and_what_is_being_written_stays(tmp_path) -> None:
    root, source = tmp_path / "store", write(tmp_path / "a", 2.0)
    with subprocess.Popen([sys.executable, "-c", KILLED, source, root], stdout=subprocess.PIPE) as writing:
        assert writing.stdout is not None and writing.stdout.readline() == b"begun\n"
        (half,) = root.iterdir()
        os.utime(half, (time.time() - 3_600,) * 2)
        assert sweep(root, 1e9) == [] and half.is_dir()
        writing.send_signal(signal.SIGKILL)
    assert store(source, root).is_dir() and half.is_dir()  # nobody takes it for a copy
    assert sweep(root, 1e9) == [half] and not half.exists()


def test_the_command_lists_and_cleans(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    root = tmp_path / "cache" / "ia3rt" / "adapters"

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["store", *arguments], env={"COLUMNS": "200"})
        assert result.exit_code == 0
        return " ".join(result.output.split())

    assert "0 copies" in run() and "0 removed" in run("--clean")
    good, bad, held = (
        store(write(tmp_path / name, value), root) for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))
    )
    os.truncate(bad / "adapter_model.safetensors", 9)
    (root / ("0" * 32)).mkdir()
    listed = run()
    assert listed.count(" good") == 2 and f"{bad.name} " in listed and "damaged" in listed and "older version" in listed
    holding = Held()
    holding.hold(held)
    assert "0 removed" in run("--clean", "--keep-gb", "1")
    assert "3 removed; 1 copies" in run("--clean")
    assert [copy.folder for copy in copies(root)] == [held]
    holding.let_go(set())
    assert "1 removed" in run("--clean")


def test_a_copy_that_was_removed_and_stored_again_is_held_again(tmp_path) -> None:
    original, held = write(tmp_path / "a"), Held()
    copy = store(original, tmp_path / "store")
    held.hold(copy)
    assert not discard(copy)
    shutil.rmtree(copy)
    assert store(original, tmp_path / "store") == copy
    held.hold(copy)
    assert not discard(copy) and copy.is_dir()
    held.let_go(set())
    assert discard(copy) and not copy.exists()
