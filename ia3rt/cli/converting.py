"""`ia3rt convert`: an adapter in PEFT's format, from any that is read."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ia3rt.adapters.checkpoint import read_checkpoint
from ia3rt.adapters.file_sites import check_finite, file_sites
from ia3rt.adapters.new_folder import check_new
from ia3rt.cli.files import write_new
from ia3rt.cli.progress import busy


def convert(console: Console, source: str, output: Path, revision: str | None, subfolder: str | None) -> str:
    """Reads an adapter and writes it as PEFT does: the same numbers, in their dtype, under its keys.

    Args:
        console: where to show that it is at work.
        source: a folder, or a Hub id.
        output: a folder that is not there yet.
        revision: the Hub repository's branch, tag or commit.
        subfolder: the folder inside that holds the adapter.

    Returns:
        Whose format it had.

    Raises:
        FileNotFoundError: there is no such adapter.
        FileExistsError: the output is there already.
        ValueError: it is damaged, of another kind, or has a NaN or inf. Nothing is written then.
    """
    check_new(output)
    with busy(console, "Reading the adapter"):
        checkpoint = read_checkpoint(source, revision=revision, subfolder=subfolder)
    check_finite(source, checkpoint)
    sites = file_sites({source: checkpoint})
    vectors = {sites[key]: vector.reshape(-1) for key, vector in checkpoint.vectors.items()}
    write_new(output, vectors, [checkpoint], checkpoint.config.get("base_model_name_or_path"))
    return checkpoint.written_by
