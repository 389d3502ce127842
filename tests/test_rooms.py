"""The house: each room imports the rooms that it may, and no file needs, however indirectly, one that needs it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"ia3rt": ROOT / "ia3rt", **{f"ia3rt.{name}": ROOT / name for name in ("kernels", "bench", "examples")}}

# From top to bottom: the rooms, and what each may import besides itself. The doors are what stands in ia3rt/ itself:
# patch.py, runtime.py, __init__.py, and __main__.py.
LIBRARY = {"doors", "modules", "routing", "ops", "kernels", "reference", "adapters"}
MAY_IMPORT = {
    "bench": {"cli", "examples", *LIBRARY},
    "serving": {"cli", *LIBRARY},
    "cli": {"examples", *LIBRARY},
    "examples": LIBRARY,
    "doors": {"modules", "routing", "ops", "adapters"},
    "modules": {"routing", "ops", "kernels", "reference", "adapters"},
    "routing": {"adapters"},
    "ops": {"kernels", "reference"},
    "kernels": {"reference"},
    "reference": set(),
    "adapters": set(),
}

# What the command starts or borrows of what is above it: it is one command for all, and the package's own.
UPWARDS = {
    ("ia3rt.__main__", "ia3rt.cli.main"),
    ("ia3rt.cli.main", "ia3rt.bench.cli"),
    ("ia3rt.cli.main", "ia3rt.serving.command"),
    ("ia3rt.cli.main", "ia3rt.serving.store_command"),
    ("ia3rt.cli.demo", "ia3rt.bench.interleaved"),
}


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
    return part if part in MAY_IMPORT else "doors"


def uses(name: str) -> set[str]:
    """The files that a file imports: anywhere in it, for types only too, and by import_module."""
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
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            (written,) = node.args
            begin = written.values[0] if isinstance(written, ast.JoinedStr) else written
            if isinstance(begin, ast.Constant):  # an engine's own modules are named elsewhere
                prefix = str(begin.value)
                yield from (file for file in FILES if file == prefix or (file.startswith(prefix) and prefix[-1] == "."))


def test_every_file_has_a_room() -> None:
    assert len(FILES) > 100  # else nothing was read
    assert {room(name) for name in FILES} == set(MAY_IMPORT)
    doors = {name for name in FILES if room(name) == "doors"}
    known = {"ia3rt", "ia3rt.__main__", "ia3rt.patch", "ia3rt.runtime"}
    assert doors == known, "a file belongs into a room: see docs/architecture.md"


def test_the_rooms_stand_on_floors() -> None:
    order = list(MAY_IMPORT)
    for name, below in MAY_IMPORT.items():
        assert all(order.index(each) > order.index(name) for each in below), name


@pytest.mark.parametrize("name", FILES)
def test_a_room_uses_only_what_it_may(name: str) -> None:
    allowed = MAY_IMPORT[room(name)] | {room(name)}
    for used in uses(name):
        if (name, used) not in UPWARDS:
            assert room(used) in allowed, f"{name} uses {used}: {room(name)} may use {sorted(allowed)}"


def test_what_points_upwards_is_still_needed() -> None:
    assert {(name, used) for name in FILES for used in uses(name)} >= UPWARDS


def test_there_is_no_circle() -> None:
    """Depth first: a file that is met again before all that it uses is done closes a circle."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, "a circle: " + " → ".join([*path[path.index(name) :], name])
        if name not in done:
            for used in sorted(uses(name) - {"ia3rt"}):
                visit(used, [*path, name])
            done.add(name)

    for name in FILES:
        if name != "ia3rt":
            visit(name, [])
