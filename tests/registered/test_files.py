"""Files that change, are damaged or gone: what is worn goes on, and what is named from then on is what they are."""

from __future__ import annotations

import os
import shutil
import time

import pytest
import torch
from registering import IDS, patched, replace
from tiny import logits

import ia3rt


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: shutil.rmtree(folder), FileNotFoundError, "adapter 'b' was registered, and its files are gone"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"),
            ValueError,
            "adapter 'b' was registered, and cannot be read: .* is damaged",
        ),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            FileNotFoundError,
            "adapter 'b' was registered, .* holds neither",
        ),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{"),
            ValueError,
            "adapter 'b' was registered, and cannot be read: .* is damaged",
        ),
        (lambda folder: replace(folder, float("nan")), ValueError, "'b' has a NaN or inf"),
    ],
    ids=["gone", "damaged", "no weights", "broken config", "nan"],
)
@pytest.mark.parametrize("resident", [False, True])
def test_files_that_are_gone_or_damaged_when_they_are_wanted(
    folder, truth, every_time, damage, error, message, resident
):
    runtime = patched(folder)
    if resident:
        runtime.set_adapter("b")
    runtime.set_adapter("a")
    damage(folder / "b")
    for wear in (
        runtime.set_adapter,
        lambda spec: runtime.route([spec, "a", None, None]),
        runtime.pin,
        runtime.get_adapter,
    ):
        with pytest.raises(error, match=message):
            wear("b")
    with pytest.raises(error, match=message):
        runtime.prefetch("b").result()
    assert torch.equal(logits(runtime.model, IDS), truth["a"])
    shutil.rmtree(folder / "b", ignore_errors=True)
    shutil.copytree(folder / "c", folder / "b")
    runtime.set_adapter("b")
    assert torch.equal(logits(runtime.model, IDS), truth["c"])


def test_files_that_changed_are_noticed_and_never_mixed_with_what_is_worn(folder, truth, every_time):
    runtime = patched(folder, rows=3)
    with runtime.route(["b", "b", None, "a"]):
        shutil.rmtree(folder / "b")
        shutil.copytree(folder / "c", folder / "b")
        with runtime.route(["b", "a", "b", None]):
            worn = logits(runtime.model, IDS)
            for row, name in enumerate(["c", "a", "c", None]):
                assert torch.equal(worn[row], truth[name][row])
        worn = logits(runtime.model, IDS)
        for row, name in enumerate(["b", "b", None, "a"]):
            assert torch.equal(worn[row], truth[name][row]), "what was worn before goes on"
    runtime.set_adapter("b")
    assert torch.equal(logits(runtime.model, IDS), truth["c"])
    assert runtime.stats().changed == 1


def test_a_row_in_the_hosts_memory_is_not_used_where_the_files_are_others(folder, truth):
    runtime = patched(folder, rows=1)
    for name in "ab":
        runtime.set_adapter(None)
        runtime.set_adapter(name)
    shutil.rmtree(folder / "a")
    shutil.copytree(folder / "d", folder / "a")
    runtime.set_adapter(None)
    runtime.set_adapter("a")
    assert torch.equal(logits(runtime.model, IDS), truth["d"])


def test_a_pinned_adapter_stays_as_it_was(folder, truth, every_time):
    runtime = patched(folder, rows=3)
    runtime.pin("a")
    replace(folder / "a", 0.5)
    for name in "bcd":
        runtime.set_adapter(name)
    runtime.set_adapter("a")
    assert torch.equal(logits(runtime.model, IDS), truth["a"])
    with pytest.raises(ValueError, match="'b' is not pinned"):
        runtime.unpin("b")
    runtime.unpin("a")
    runtime.set_adapter("a")
    assert not torch.equal(logits(runtime.model, IDS), truth["a"])


def test_a_loaded_adapter_is_pinned_and_unpinned_too(folder):
    runtime = patched(folder, rows=3)
    runtime.load_adapter(folder / "a", "loaded")
    runtime.pin("loaded")
    runtime.unpin("loaded")
    with pytest.raises(ValueError, match="'loaded' is not pinned"):
        runtime.unpin("loaded")
    for name in "bcd":
        runtime.set_adapter(name)
    assert "loaded" in runtime.adapters


def test_a_trained_adapter_is_no_more_its_files(folder, truth):
    runtime = patched(folder, rows=3)
    parameters = runtime.train_adapter("a")
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(0.5)
    runtime.end_training()
    trained = logits(runtime.model, IDS)
    for name in "bcd":
        runtime.set_adapter(name)
    runtime.set_adapter("a")
    assert torch.equal(logits(runtime.model, IDS), trained) and not torch.equal(trained, truth["a"])


def test_who_found_an_adapter_wears_it_whatever_became_of_it_before_it_was_worn(folder, truth, every_time):
    """Its files changed, the newer one was brought in and evicted; or somebody deleted it."""
    runtime = patched(folder, rows=3)
    runtime.set_adapter("b")
    runtime.set_adapter(None)
    found = runtime._tiers.fetch(["b"])
    replace(folder / "b", 0.5)
    for name in "bacd":
        runtime.set_adapter(name)
    assert "b" not in runtime.adapters
    runtime._wear_everywhere([ia3rt.Mix(("b",))], found)
    assert torch.equal(logits(runtime.model, IDS), truth["b"])
    runtime.set_adapter("b")
    assert not torch.equal(logits(runtime.model, IDS), truth["b"]), "and from then on the newer one"
    found = runtime._tiers.fetch(["b"])
    runtime.set_adapter(None)
    runtime.delete_adapter("b")
    for wear in (lambda: runtime._pin("b", found), lambda: runtime._wear_everywhere([ia3rt.Mix(("b",))], found)):
        with pytest.raises(ValueError, match="unknown adapter 'b'"):
            wear()


def test_files_that_are_written_over_within_a_tick_of_their_clock(folder, truth, every_time):
    """In place, as long as before: only the time says that they are others, and it goes in steps."""
    runtime = patched(folder)
    file, tick = folder / "c" / "adapter_model.safetensors", 25 * 10**6
    written = {name: (folder / name / "adapter_model.safetensors").read_bytes() for name in "ab"}
    for _ in range(20):
        for name, content in written.items():
            file.write_bytes(content)
            now = time.time_ns() // tick * tick
            os.utime(file, ns=(now, now))
            runtime.set_adapter("c")
            assert torch.equal(logits(runtime.model, IDS), truth[name])


def test_where_there_is_no_room_for_a_changed_adapter_the_one_of_before_stays(folder, truth, every_time):
    runtime = patched(folder, rows=2)
    runtime.set_adapter("b")
    with runtime.route(["a", "b", None, None]):
        replace(folder / "b", 0.5)
        with pytest.raises(ValueError, match="1 more row of the bank wanted, 0 can be had"):
            runtime.route(["b", None, None, None])
        assert runtime.adapters == ["b", "a"]
    runtime.set_adapter(None)
    runtime.set_adapter("b")
    assert not torch.equal(logits(runtime.model, IDS), truth["b"])


def test_what_is_merged_is_what_is_worn_and_not_what_its_files_are_now(folder, truth, every_time):
    runtime = patched(folder)
    runtime.set_adapter("b")
    replace(folder / "b", 0.5)
    runtime.merge_adapter()
    torch.testing.assert_close(logits(runtime.model, IDS), truth["b"])
    runtime.unmerge_adapter()
    runtime.merge_adapter("b")
    assert not torch.allclose(logits(runtime.model, IDS), truth["b"])
