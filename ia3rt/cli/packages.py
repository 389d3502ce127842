"""Packages that a command needs and ia3rt does not: whether they are there, and how they are kept quiet."""

from __future__ import annotations

import importlib
import importlib.util
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from ia3rt.cli.errors import MissingPackageError


def require(package: str, command: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        MissingPackageError: it is not installed; the message says to run `command`.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(f"this needs the package {package.replace('_', '-')}: {command}")
    return Path(spec.submodule_search_locations[0])


@contextmanager
def quiet() -> Iterator[None]:
    """A context in which transformers and PEFT print neither warnings nor progress bars of their own."""
    logging: Any = importlib.import_module("transformers.utils.logging")  # Any: it is not typed
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The GGUF loader's bar obeys no setting, so stderr goes too; errors are raised, not printed.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
