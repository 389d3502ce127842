"""`ia3rt store`: what the servers of this machine have stored of adapters, and cleaning it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ia3rt.serving.settings import store_folder
from ia3rt.serving.vllm.cleaning import copies, sweep
from ia3rt.serving.vllm.store import DamagedCopyError, is_stored_name, read_stored


def list_store(console: Console) -> None:
    """Prints the stored copies, the last used first, and whether each is as it was stored."""
    root = store_folder()
    found = copies(root)
    table = Table(box=None, header_style="bold")
    for title in ("copy", "kB", "last used", "is"):
        table.add_column(title, justify="right" if title == "kB" else "left")
    for copy in reversed(found):
        used = datetime.fromtimestamp(copy.used).isoformat(" ", "seconds")
        table.add_row(copy.folder.name, f"{copy.size / 1e3:,.0f}", used, _state(copy.folder))
    if found:
        console.print(table)
    console.print(Text(f"{len(found):,} copies, {sum(copy.size for copy in found) / 1e6:,.1f} MB, in {root}"))


def clean_store(console: Console, keep_gb: float) -> None:
    """Removes what a kill left half written, and the copies that were used least recently and no server has loaded.

    Args:
        console: where it says what it did.
        keep_gb: how many GB of copies may stay.
    """
    removed = sweep(store_folder(), 1e9 * keep_gb)
    left = copies(store_folder())
    size = sum(copy.size for copy in left)
    console.print(Text(f"{len(removed):,} removed; {len(left):,} copies, {size / 1e6:,.1f} MB, are left"))


def _state(folder: Path) -> str:
    if not is_stored_name(folder.name):
        return "of an older version"
    try:
        read_stored(folder)
    except DamagedCopyError:
        return "damaged"
    return "good"
