"""`ia3rt combine`: an adapter made of others, from files to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ia3rt.adapters.combining.combination import Combination
from ia3rt.adapters.file_experts import check_experts
from ia3rt.adapters.file_sites import bank_of_files
from ia3rt.adapters.new_folder import check_new
from ia3rt.cli.errors import UsageError
from ia3rt.cli.files import one_base_model, read_all, write_new
from ia3rt.cli.progress import busy
from ia3rt.routing.combined import combined_vectors


def parse_weights(text: str | None) -> tuple[float, ...] | None:
    """The numbers of `0.7,0.3`; None where nothing is given.

    Raises:
        UsageError: something between the commas is no number.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError("--weights", f"{text!r} is no list of numbers, such as 0.7,0.3") from None


def combine(
    console: Console, combination: Combination, output: Path, importances: Sequence[str], base_model: str | None
) -> None:
    """Reads adapters, combines them and writes what that gives.

    Args:
        console: where to show that it is at work.
        combination: whose adapters are folders or Hub ids.
        output: a folder that is not there yet.
        importances: for `fisher`: for each adapter, a folder with the keys and shapes of its own.
        base_model: what the config says that it was trained on; None takes what all the adapters say.

    Raises:
        UsageError: an adapter is given twice, or importances are not one for each.
        FileNotFoundError: there is no such adapter.
        FileExistsError: the output is there already.
        ValueError: a file is damaged, the adapters are of different models, or cannot be combined so. Nothing is
            written then.
    """
    check_new(output)
    checkpoints = read_all(console, combination.adapters)
    check_experts(checkpoints, combination)
    base_model = one_base_model(checkpoints, base_model)
    if importances and len(importances) != len(checkpoints):
        raise UsageError("--importances", f"{len(importances)} given for {len(checkpoints)} adapters: give each one")
    read = [each.vectors for each in read_all(console, importances, "--importances").values()]
    with busy(console, "Combining them"):
        bank = bank_of_files(checkpoints)
        vectors = combined_vectors(bank, combination, dict(zip(checkpoints, read, strict=True)) if read else None)
        write_new(output, vectors, checkpoints.values(), base_model)
