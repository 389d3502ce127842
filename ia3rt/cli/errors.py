"""What a user of the command line can mend."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

INTERRUPTED = 130
"""What a command that Ctrl-C ended exits with, as shells have it."""


class MissingPackageError(RuntimeError):
    """A package is not installed; the message says how to install it."""


class UsageError(ValueError):
    """An option's value is of no use.

    Attributes:
        option: the option, as the user writes it.
    """

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


def first_line(error: BaseException) -> str:
    """What an error says, without what it goes on with."""
    return str(error).strip().partition("\n")[0]


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """Prints what a user can mend as one red line, and exits with 1, or with 2 where an option is to blame."""
    try:
        yield
    except UsageError as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from error
    except (ValueError, OSError, MissingPackageError) as error:
        line = " ".join(str(error).split())
        Console(stderr=True).print(Text(f"Error: {line}", style="red"), soft_wrap=True)
        raise typer.Exit(1) from error


def print_anything() -> None:
    """Lets standard output take characters that its encoding lacks, as `\\u2026`, as standard error does."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a test's, or a notebook's, may be none
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def reporting_on(output: Path) -> Iterator[None]:
    """A context in which a report on what was written is printed.

    Raises:
        OSError: it cannot be; the message says that `output` is there nevertheless.
    """
    try:
        yield
    except OSError as error:
        # What is left to print would be tried again as Python ends, and fail once more, with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(f"{output} is written, but the report on it cannot be printed: {error}") from error
