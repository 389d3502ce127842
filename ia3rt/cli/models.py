"""A model that a command is given, a folder or a Hub id: whether it is there, and why it was not loaded."""

from __future__ import annotations

import os

from ia3rt.adapters.folder import is_folder
from ia3rt.cli.errors import UsageError, first_line


def check_model(model: str, option: str) -> None:
    """Looks at a model that is named by a path, which transformers would take for a Hub id; those are its to find.

    Args:
        model: a folder or a Hub id.
        option: what it was given as.

    Raises:
        UsageError: there is no such folder.
    """
    try:
        is_folder(model, "the model")
    except FileNotFoundError as error:
        raise UsageError(option, str(error)) from error


def why_not(model: str, error: Exception) -> str:
    """What to say of a model that was not loaded, in a line: transformers' messages go on for pages.

    Args:
        model: a folder or a Hub id.
        error: what transformers raised.
    """
    named = repr(model) if os.path.isdir(model) else f"{model!r}, which is no folder here"
    return f"{named}: {first_line(error)}"
