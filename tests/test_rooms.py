"""The house: each folder uses only what is below it, and no file needs, however indirectly, one that needs it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"ia3rt": ROOT / "ia3rt", **{f"ia3rt.{name}": ROOT / name for name in ("kernels", "bench", "examples")}}

# From top to bottom. The doors are what stands in ia3rt/ itself: patch.py, runtime.py, and __init__.py.
FLOORS = [
    "bench",
    "serving",
    "cli",
    "examples",
    "doors",
    "modules",
    "routing",
    "ops",
    "kernels",
    "reference",
    "adapters",
]

# What the command starts or borrows of what is above it: it is one command for all.
UPWARDS = {
    ("ia3rt.cli.main", "ia3rt.bench.cli"),
    ("ia3rt.cli.main", "ia3rt.serving.command"),
    ("ia3rt.cli.demo", "ia3rt.bench.interleaved"),
}

# Only these may use a room, whatever their floor.
USERS = {"serving": {"serving", "cli"}, "kernels": {"kernels", "ops", "modules", "serving", "bench"}}


def files() -> dict[str, Path]:
    """Every file of the package by its dotted name, as installed."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


FILES = files()


def room(name: str) -> str:
    part = name.split(".")[1] if "." in name else ""
    return part if part in FLOORS else "doors"


def uses(name: str) -> set[str]:
    """The files that a file imports: anywhere in it, for types only too."""
    return set(_uses(name)) - {name}


def _uses(name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(FILES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import: write it out"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                if inside in FILES:
                    yield inside
                elif node.module in FILES:
                    yield node.module


def test_every_file_has_a_room() -> None:
    assert len(FILES) > 100  # else nothing was read
    assert {room(name) for name in FILES} == set(FLOORS)
    doors = {name for name in FILES if room(name) == "doors"}
    assert doors == {"ia3rt", "ia3rt.patch", "ia3rt.runtime"}, "a file belongs into a room: see docs/architecture.md"


@pytest.mark.parametrize("name", FILES)
def test_a_room_uses_only_what_is_below_it(name: str) -> None:
    for used in uses(name):
        if (name, used) in UPWARDS:
            continue
        if used == "ia3rt":  # what users import; the rooms below the doors name its files
            assert FLOORS.index(room(name)) <= FLOORS.index("doors"), f"{name} imports ia3rt itself"
        above, below = FLOORS.index(room(name)), FLOORS.index(room(used))
        assert above <= below, f"{name} uses {used}, which is on a floor above it"
        allowed = USERS.get(room(used))
        assert allowed is None or room(name) in allowed, f"{name} uses {used}: only {sorted(allowed)} do"


def test_what_points_upwards_is_still_needed() -> None:
    assert {(name, used) for name in FILES for used in uses(name)} >= UPWARDS


def test_there_is_no_circle() -> None:
    """Files are taken away that use none of those left, until none is left, or only circles are."""
    left = {name: uses(name) - {"ia3rt"} for name in FILES if name != "ia3rt"}
    while free := [name for name, used in left.items() if not used & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these use one another: {sorted(left)}"
