"""Adapters in their folders, and what PEFT's model computes with each of them: one adapter at a time, to the bit."""

from __future__ import annotations

import shutil

import pytest
from registering import IDS, NAMES
from tiny import logits, peft_model, save_each, tiny_model

from ia3rt.adapters import tiers


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with an adapter's folder for each name, never written to, and what PEFT computes with each of them."""
    wrapped = peft_model(tiny_model(), "llama", NAMES)
    root = tmp_path_factory.mktemp("adapters")
    save_each(wrapped, root)
    with wrapped.disable_adapter():
        truth = {None: logits(wrapped, IDS)}
    for name in NAMES:
        wrapped.set_adapter(name)
        truth[name] = logits(wrapped, IDS)
    return root, truth


@pytest.fixture
def truth(saved):
    return saved[1]


@pytest.fixture
def folder(saved, tmp_path):
    """The same, to be written to."""
    return shutil.copytree(saved[0], tmp_path / "adapters")


@pytest.fixture
def every_time(monkeypatch):
    """Looks at files each time an adapter is named, not once a second."""
    monkeypatch.setattr(tiers, "_FRESH", -1.0)
