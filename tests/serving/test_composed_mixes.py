"""Mixes that are composed before a step needs them: what is kept is what the worker reads, and not too much."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
import torch

from ia3rt.adapters.checkpoint import write_checkpoint
from ia3rt.adapters.mix import Mix
from ia3rt.adapters.site import Site
from ia3rt.serving.vllm import admission, composed_mixes, read
from ia3rt.serving.vllm.admission import Admission
from ia3rt.serving.vllm.composed_mixes import ComposedMixes, read_composed
from ia3rt.serving.vllm.scale_check import LargeScaleError
from ia3rt.serving.vllm.source import Source
from ia3rt.serving.vllm.store import store

SITES = [Site("layers.0.k_proj", "out", 16), Site("layers.0.down_proj", "in", 24)]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        vectors = {site: 1 + torch.randn(site.width, generator=generator) for site in SITES}
        write_checkpoint(tmp_path / name, vectors, [site.path for site in SITES], {}, {}, [])
    return {name: str(tmp_path / name) for name in "ab"}


def mix(folders: dict[str, str], weight: float) -> Source:
    return Source(Mix(("a", "b"), (weight, 0.5), "linear"), folders)


def test_a_worker_reads_what_it_would_compose(folders, tmp_path) -> None:
    source = mix(folders, 0.25)
    kept = ComposedMixes(tmp_path / "mixes")
    asyncio.run(Admission(100.0, kept).admit(source))
    read, right = read_composed(source.path(), tmp_path / "mixes"), source.vectors()
    assert read is not None and read.keys() == right.keys()
    assert all(torch.equal(read[site], right[site]) for site in right)


def test_damaged_or_missing_is_not_read(folders, tmp_path) -> None:
    source, root = mix(folders, 0.25), tmp_path / "mixes"
    asyncio.run(Admission(100.0, ComposedMixes(root)).admit(source))
    (file,) = root.iterdir()
    content = file.read_bytes()
    for damaged in (b"", content[:40], content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        file.write_bytes(damaged)
        assert read_composed(source.path(), root) is None
    file.unlink()
    assert read_composed(source.path(), root) is None


def test_those_used_least_recently_go(folders, tmp_path) -> None:
    root = tmp_path / "mixes"
    vectors = mix(folders, 1.0).vectors()
    kept = ComposedMixes(root)
    kept.write("first", vectors)
    (file,) = root.iterdir()
    size = file.stat().st_size
    kept = ComposedMixes(root, 3 * size)  # a server that is started again knows what is there
    for path in ("second", "third"):
        kept.write(path, vectors)
    assert kept.holds("first")
    kept.write("fourth", vectors)
    assert [kept.holds(path) for path in ("first", "second", "third", "fourth")] == [True, False, True, True]
    for number in range(500):
        kept.write(str(number), vectors)
    assert sum(file.stat().st_size for file in root.iterdir()) <= 3 * size


def test_there_are_not_too_many_however_small(folders, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(composed_mixes, "MOST_FILES", 5)
    kept = ComposedMixes(tmp_path / "mixes")
    for number in range(50):
        kept.write(str(number), mix(folders, 1.0).vectors())
    assert len(list((tmp_path / "mixes").iterdir())) == len(kept._sizes) == 5


def test_what_is_refused_is_not_kept(folders, tmp_path) -> None:
    root = tmp_path / "mixes"
    with pytest.raises(LargeScaleError):
        asyncio.run(Admission(100.0, ComposedMixes(root)).admit(mix(folders, 101.0)))
    assert not root.exists()


def test_what_a_server_with_another_limit_kept_is_checked(folders, tmp_path) -> None:
    root = tmp_path / "mixes"
    asyncio.run(Admission(100.0, ComposedMixes(root)).admit(mix(folders, 5.0)))
    admits = Admission(2.0, ComposedMixes(root))
    for _ in range(2):
        with pytest.raises(LargeScaleError):
            asyncio.run(admits.admit(mix(folders, 5.0)))
    with pytest.raises(LargeScaleError):
        admits.admit_now(mix(folders, 5.0))


def test_a_mix_is_composed_once_and_few_at_a_time(folders, tmp_path, monkeypatch) -> None:
    """Beside the loop, which goes on meanwhile."""
    running, most, calls = 0, 0, 0
    lock = threading.Lock()

    def slow(bank, worn, limit):
        nonlocal running, most, calls
        with lock:
            running, calls = running + 1, calls + 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return checked(bank, worn, limit)

    checked = admission.checked_vectors
    monkeypatch.setattr(admission, "checked_vectors", slow)

    async def run() -> int:
        admits = Admission(100.0, ComposedMixes(tmp_path / "mixes"))
        work = asyncio.gather(*(admits.admit(mix(folders, number % 12)) for number in range(60)))
        turns = 0
        while not work.done():
            await asyncio.sleep(0.001)
            turns += 1
        await work
        return turns

    turns = asyncio.run(run())
    assert calls == 12 and most == admission.AT_ONCE and turns > 12


def test_an_adapter_is_read_once_for_many_mixes(folders, tmp_path, monkeypatch) -> None:
    store_root = tmp_path / "store"
    kept = {name: str(store(folder, store_root)) for name, folder in folders.items()}
    calls: list[Path] = []
    original = read.read_folder
    monkeypatch.setattr(read, "read_folder", lambda folder, name: calls.append(folder) or original(folder, name))
    admits = Admission(100.0, ComposedMixes(tmp_path / "mixes"))
    for number in range(20):
        asyncio.run(admits.admit(mix(kept, number)))
        asyncio.run(admits.admit(mix(folders, number)))  # no stored copies: what they hold may change
    assert all(calls.count(Path(folder)) == 1 for folder in kept.values())
    assert all(calls.count(Path(folder)) == 20 for folder in folders.values())
    few = read.Read(2 * 16)
    for folder in kept.values():
        few(Path(folder), "a")
    assert few._total <= 32


def test_a_full_disk_keeps_nothing_and_refuses_nothing(folders, tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(composed_mixes.os, "replace", full)
    root = tmp_path / "mixes"
    asyncio.run(Admission(100.0, ComposedMixes(root)).admit(mix(folders, 0.25)))
    assert list(root.iterdir()) == []
