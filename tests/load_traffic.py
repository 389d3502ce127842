"""The load test's threads: what they ask of a Runtime, what may be answered, and the mishaps meanwhile."""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from load_truth import WEIGHTS, Reference, Worn, as_file, by_site, put, write
from tiny import VOCABULARY
from torch import Tensor

import ia3rt
from ia3rt.adapters.residents import NoRowError

LENGTH, NEW = 6, 3
FRESH = 1.05
"""Seconds after a change in which a resident adapter may still be what its files were: documented is one."""
APART = 1e-4
"""How far from the right logits float32 may be, of their norm; those of another adapter are 0.5 away."""
UNKNOWN, GONE, DAMAGED = "unknown", "gone", "damaged"
TOLD = {UNKNOWN: "unknown adapter", GONE: "and its files are gone", DAMAGED: "cannot be read|has a NaN or inf"}
_BATCH = 256
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Meaning:
    """What a name is from some time on: the content of an adapter, or why there is none.

    Attributes:
        of: that.
        asked: when it was made so, at the earliest.
        until: when nobody can get it any more, at the latest.
    """

    of: int | str
    asked: float
    until: float = math.inf


class Names:
    """The registered names, and what each may mean when.

    Args:
        names: them; the adapter of the i-th is content i at first.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._meanings = {name: [Meaning(number, -math.inf)] for number, name in enumerate(names)}
        self._lock = threading.Lock()
        self._busy: set[str] = set()
        self._pins: dict[str, list[list[float]]] = {}

    def take(self, name: str) -> bool:
        """Lets nobody else change a name; False where somebody does already."""
        with self._lock:
            if name in self._busy:
                return False
            self._busy.add(name)
            return True

    def give(self, name: str) -> None:
        """Ends what `take` began."""
        self._busy.discard(name)

    def now(self, name: str) -> int | str:
        """What it means."""
        return self._meanings[name][-1].of

    @contextlib.contextmanager
    def becoming(self, name: str, of: int | str, grace: float = FRESH) -> Iterator[None]:
        """A context in which a name gets to mean something else; for so long after it, it may mean the earlier."""
        meanings = self._meanings[name]
        meanings.append(Meaning(of, time.monotonic()))
        yield
        meanings[-2].until = time.monotonic() + grace
        end = time.monotonic() - 60
        meanings[:] = [each for each in meanings if each.until > end]

    @contextlib.contextmanager
    def pinned(self, name: str) -> Iterator[None]:
        """A context in which a name may mean, to all who ask, what it does when the context begins."""
        pin = [time.monotonic(), math.inf]
        pins = self._pins.setdefault(name, [])
        pins[:] = [each for each in pins if each[1] > pin[0] - 60]
        pins.append(pin)
        try:
            yield
        finally:
            pin[1] = time.monotonic()

    def possible(self, name: str, begin: float, end: float) -> list[int | str]:
        """What it may have meant to who asked then."""
        pins = [since for since, until in list(self._pins.get(name, ())) if since <= end and until >= begin]
        begin = min(begin, *pins) if pins else begin
        found = [each.of for each in list(self._meanings[name]) if each.asked <= end and each.until >= begin]
        return list(dict.fromkeys(found))


@dataclass
class Ask:
    """A mix, as it is asked for.

    Attributes:
        names: of its adapters.
        kind: how they combine.
        weights: one for each; of a product there are none.
        spec: the same as a Runtime takes it.
    """

    names: tuple[str, ...] = ()
    kind: str = "product"
    weights: tuple[float, ...] = ()
    spec: object = None


@dataclass
class Counts:
    """What happened.

    Attributes:
        asked: requests, by kind.
        right: those that were answered rightly,
        refused: and those that got an error that they had to expect, by its kind.
        wrong: what else there was.
        rows: how many rows of batches were compared.
        faults: what was done to files.
    """

    asked: Counter[str] = field(default_factory=Counter)
    right: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    rows: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    @property
    def requests(self) -> int:
        """All of them."""
        return self.asked.total()


class Traffic:
    """Threads that use one Runtime.

    Args:
        runtime: it.
        names: what is registered, the popular ones first.
        folder: where each name's folder is.
        rows: of the bank.
    """

    def __init__(self, runtime: ia3rt.Runtime, names: Sequence[str], folder: Path, rows: int) -> None:
        self.runtime, self.folder, self.rows = runtime, folder, rows
        self.counts, self.names = Counts(), Names(names)
        self.ended = threading.Event()
        self.seen: list[tuple[int, int, int, int, int]] = []
        self._all = list(names)
        self._popular = list(accumulate(1 / rank for rank in range(1, len(names) + 1)))
        self._lock = threading.Lock()
        self._truth = threading.Lock()
        self._reference = Reference()
        self._waiting: dict[int, list[tuple[Tensor, Tensor, list[Worn], str]]] = {}
        self._hogs: list[list[float]] = []
        self._contents = len(names)

    # Threads.

    def run(self, requests: int, seconds: float, workers: int = 4) -> None:
        """Asks until there were so many requests, or for so long."""
        self._end = time.monotonic() + seconds
        threads = [threading.Thread(target=self._work, args=(seed, requests)) for seed in range(workers)]
        threads += [threading.Thread(target=self._mischief, args=(seed,)) for seed in (100, 101)]
        threads.append(threading.Thread(target=self._watch))
        for thread in threads:
            thread.start()
        for thread in threads[:workers]:
            thread.join()
        self.ended.set()
        for thread in threads[workers:]:
            thread.join()
        with contextlib.suppress(ValueError, FileNotFoundError):
            self.runtime.prefetch(self._all[-1]).result(60)  # and so all that were asked for before
        for length in list(self._waiting):
            self._compare(self._waiting.pop(length))

    def _is_over(self) -> bool:
        return time.monotonic() > self._end or len(self.counts.wrong) > 20

    def _work(self, seed: int, requests: int) -> None:
        chance, mine = random.Random(seed), f"own{seed}"
        kinds = dict(KINDS) if seed else {**dict(KINDS), "everywhere": 30}
        try:
            self._request(("forward", "hog", "again", "generate")[seed % 4], chance, mine)
            while not self._is_over() and self.counts.requests < requests:
                (kind,) = chance.choices(list(kinds), list(kinds.values()))
                self._request(kind, chance, mine)
        except BaseException as error:
            self._wrong(f"a thread ended: {error!r}")

    def _request(self, kind: str, chance: random.Random, mine: str, asks: Sequence[Ask] | None = None) -> None:
        """One request, which is answered rightly, or by an error that it has to expect."""
        if asks is None:
            asks = self._asks(kind, chance)
        with self._lock:
            self.counts.asked[kind] += 1
        begin = time.monotonic()
        try:
            getattr(self, f"_{kind}")(asks, chance, mine)
        except Exception as error:
            why = self._expected(error, asks, begin)
            if why is None:
                self._wrong(f"{kind} {[ask.spec for ask in asks]}: {error!r}")
                return
            with self._lock:
                self.counts.refused[why] += 1
        else:
            with self._lock:
                self.counts.right += 1

    def _expected(self, error: Exception, asks: Sequence[Ask], begin: float) -> str | None:
        """The kind of an error that somebody who asked for this then has to expect; None of others."""
        end, text = time.monotonic(), str(error)
        if isinstance(error, NoRowError):
            return "no row" if any(hog[0] <= end and hog[1] >= begin for hog in list(self._hogs)) else None
        for name in dict.fromkeys(name for ask in asks for name in ask.names):
            for meaning in self.names.possible(name, begin, end):
                if isinstance(meaning, str) and repr(name) in text and re.search(TOLD[meaning], text):
                    return meaning
        return None

    def _wrong(self, told: str) -> None:
        with self._lock:
            self.counts.wrong.append(told[:500])

    # What is asked for.

    def _name(self, chance: random.Random) -> str:
        return chance.choices(self._all, cum_weights=self._popular)[0]

    def _ask(self, chance: random.Random) -> Ask:
        kind = chance.random()
        if kind < 0.05:
            return Ask()
        if kind < 0.8:
            name = self._name(chance)
            return Ask((name,), spec=name)
        names = tuple(dict.fromkeys((self._name(chance), self._name(chance))))
        if kind < 0.88 or len(names) < 2:
            return Ask(names, spec=list(names))
        weights = tuple(round(chance.uniform(-0.5, 1.0), 3) for _ in names)
        if kind < 0.94:
            return Ask(names, "linear", weights, dict(zip(names, weights, strict=True)))
        terms = "+".join(f"{name}*{weight}" for name, weight in zip(names, weights, strict=True))
        return Ask(names, "delta", weights, f"delta:{terms}")

    def _asks(self, kind: str, chance: random.Random) -> list[Ask]:
        if kind == "hog":  # more than half of the rows, each another adapter: two of them do not fit
            taken = chance.sample(self._all, self.rows * 3 // 5)
            return [Ask((name,), spec=name) for name in taken]
        count = chance.randint(1, 4) if kind in ("forward", "nested", "prefetch") else 2 if kind == "generate" else 1
        asks = [self._ask(chance) for _ in range(count)]
        if kind in ("get", "pin", "again", "prefetch"):
            asks = [Ask((name,), spec=name) for name in (self._name(chance) for _ in asks)]
        return asks

    # The kinds of requests.

    def _forward(self, asks: Sequence[Ask], chance: random.Random, mine: str) -> None:
        begin = time.monotonic()
        with self.runtime.route([ask.spec for ask in asks]):
            named = time.monotonic()
            self._run(asks, begin, named, chance)

    def _run(self, asks: Sequence[Ask], begin: float, named: float, chance: random.Random, again: bool = False) -> None:
        ids = _ids(len(asks), chance)
        with torch.no_grad():
            logits = self.runtime.model(ids, use_cache=False).logits
        self._answer(asks, ids, logits, begin, named, again)

    def _everywhere(self, asks: Sequence[Ask], chance: random.Random, mine: str) -> None:
        """What this thread sets for all that have no route; nobody else is without."""
        if any(self._is_deletable(name) for ask in asks for name in ask.names):
            asks = [Ask()]
        begin = time.monotonic()
        self.runtime.set_adapter(asks[0].spec)
        named = time.monotonic()
        for _ in range(2):
            self._run([asks[0]] * 2, begin, named, chance)

    def _nested(self, asks: Sequence[Ask], chance: random.Random, mine: str) -> None:
        """What was worn is worn again, whatever was brought in meanwhile."""
        begin = time.monotonic()
        with self.runtime.route([ask.spec for ask in asks]):
            named = time.monotonic()
            inner = [self._ask(chance) for _ in asks]
            try:
                with self.runtime.route([ask.spec for ask in inner]):
                    self._run(inner, named, time.monotonic(), chance)
            except Exception as error:
                if self._expected(error, inner, named) is None:
                    raise
            self._run(asks, begin, named, chance, again=True)

    def _generate(self, asks: Sequence[Ask], chance: random.Random, mine: str) -> None:
        """Two sequences a row: what is worn is laid again for them when generation has begun."""
        ids, begin = _ids(len(asks), chance), time.monotonic()
        options = dict(max_new_tokens=NEW, do_sample=True, num_return_sequences=2, pad_token_id=0)
        with self.runtime.route([ask.spec for ask in asks]):
            named = time.monotonic()
            made = self.runtime.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                output_logits=True,
                return_dict_in_generate=True,
                **options,
            )
        logits = torch.stack(made.logits, dim=1)
        self._answer([ask for ask in asks for _ in range(2)], made.sequences[:, :-1], logits, begin, named)

    def _prefetch(self, asks: Sequence[Ask], chance: random.Random, mine: str) -> None:
        future = self.runtime.prefetch([name for ask in asks for name in ask.names])
        if chance.random() < 0.2:
            future.result(60)

    def _get(self, asks: Sequence[Ask], chance: random.Random, mine: str) -> None:
        begin, (name,) = time.monotonic(), asks[0].names
        given = self.runtime.get_adapter(name)
        flat = torch.cat(list(given.vectors.values()))
        possible = self.names.possible(name, begin, time.monotonic())
        if not any(isinstance(each, int) and torch.equal(flat, _laid(self.runtime, each)) for each in possible):
            self._wrong(f"get_adapter({name!r}) gave what is none of {possible}")

    def _pin(self, asks: Sequence[Ask], chance: random.Random, mine: str) -> None:
        """It is as it was pinned until it is no more, whatever becomes of its files."""
        (name,) = asks[0].names
        if not self.names.take(f"pin {name}"):
            return
        try:
            with self.names.pinned(name):
                self._pin_for_a_while(name, chance.uniform(0, 0.05))
        finally:
            self.names.give(f"pin {name}")

    def _pin_for_a_while(self, name: str, seconds: float) -> None:
        begin = time.monotonic()
        self.runtime.pin(name)
        possible = self.names.possible(name, begin, time.monotonic())
        first = self.runtime.get_adapter(name).vectors
        time.sleep(seconds)
        with contextlib.suppress(ValueError):  # somebody deleted it
            second = self.runtime.get_adapter(name).vectors
            is_same = all(torch.equal(first[key], second[key]) for key in first)
            if not is_same and UNKNOWN not in self.names.possible(name, begin, time.monotonic()):
                self._wrong(f"{name!r} was pinned, and changed; it may be {possible}")
            self.runtime.unpin(name)

    def _load(self, asks: Sequence[Ask], chance: random.Random, mine: str) -> None:
        """An adapter that is loaded, worn beside others and deleted."""
        name = self._all[chance.randrange(len(self._all)) // 5 * 5 + 1]  # one that keeps its folder
        if not self.names.take(name):
            return
        try:
            content = self.names.now(name)
            assert isinstance(content, int)
            self.runtime.load_adapter(self.folder / name, mine)
        finally:
            self.names.give(name)
        try:
            ids = _ids(1, chance)
            with self.runtime.route([mine]), torch.no_grad():
                logits = self.runtime.model(ids, use_cache=False).logits
            self._compare_later(ids[0], logits[0], [Worn((content,))], f"loaded {mine}")
        finally:
            self.runtime.delete_adapter(mine)

    def _again(self, asks: Sequence[Ask], chance: random.Random, mine: str) -> None:
        """A name is deleted, and registered again with another adapter's folder."""
        name = self._all[int(chance.choices(range(len(self._all)), cum_weights=self._popular)[0]) // 5 * 5]
        if not self._is_deletable(name) or not self.names.take(name):
            return
        try:
            content = self._content()
            folder = self.folder / f"{name}-{content}"
            write(folder, content)
            with self.names.becoming(name, UNKNOWN, grace=0):
                self.runtime.delete_adapter(name)
            self._request("forward", chance, mine, [Ask((name,), spec=name)])
            with self.names.becoming(name, content, grace=0):
                self.runtime.register({name: folder})
        finally:
            self.names.give(name)

    def _hog(self, asks: Sequence[Ask], chance: random.Random, mine: str) -> None:
        """A batch of most of the bank's rows, and another beside it, for which there is no room."""
        hog = [time.monotonic(), math.inf]
        self._hogs.append(hog)
        try:
            begin = time.monotonic()
            with self.runtime.route([ask.spec for ask in asks]):
                named = time.monotonic()
                self._run(asks, begin, named, chance)
                first = {name for ask in asks for name in ask.names}
                others = [name for name in chance.sample(self._all, self.rows) if name not in first]
                before = self.runtime.active_adapters
                second = [Ask((name,), spec=name) for name in others[: self.rows * 3 // 5]]
                self._request("crowd", chance, mine, second)
                if self.runtime.active_adapters != before:
                    self._wrong("a batch that was refused changed what is worn")
                self._run(asks, begin, named, chance)
                time.sleep(0.05)
        finally:
            hog[1] = time.monotonic()

    def _crowd(self, asks: Sequence[Ask], chance: random.Random, mine: str) -> None:
        """A second batch of more than half of the rows: there is no room for it."""
        self.runtime.route([ask.spec for ask in asks])
        self._wrong("two batches of more than half of the rows each were worn at once")

    # Mishaps.

    def _mischief(self, seed: int) -> None:
        chance = random.Random(seed)
        try:
            while not self.ended.wait(chance.uniform(0, 0.1)):
                name = self._name(chance)
                if self._is_deletable(name) or not self.names.take(name):
                    continue
                try:
                    fault = chance.choice(FAULTS)
                    with self._lock:
                        self.counts.faults[fault] += 1
                    getattr(self, f"_{fault}")(name, chance)
                finally:
                    self.names.give(name)
        except BaseException as error:
            self._wrong(f"mischief ended: {error!r}")

    def _other_content(self, name: str, chance: random.Random) -> None:
        content = self._content()
        with self.names.becoming(name, content):
            write(self.folder / name, content)

    def _corrupt(self, name: str, chance: random.Random) -> None:
        content = self._content()
        whole = as_file(content)
        kind = chance.randrange(4)
        if kind == 0:
            damaged = whole[: chance.randrange(len(whole))]
        elif kind == 1:
            damaged = b"\xff" * 64 + whole[64:]
        elif kind == 2:
            damaged = whole[:-4] + b"\x00\x00\xc0\x7f"  # the last number is a NaN
        else:
            damaged = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        with self.names.becoming(name, DAMAGED):
            put(self.folder / name / WEIGHTS, damaged)
        self._meets(name, chance)
        with self.names.becoming(name, content):
            write(self.folder / name, content)

    def _missing(self, name: str, chance: random.Random) -> None:
        content, folder = self.names.now(name), self.folder / name
        with self.names.becoming(name, GONE):
            away = folder.rename(folder.with_name(f"{name}-away"))
        self._meets(name, chance)
        with self.names.becoming(name, content):
            away.rename(folder)

    def _meets(self, name: str, chance: random.Random) -> None:
        """Somebody wants it soon."""
        time.sleep(chance.choice([0.0, 0.05, FRESH]))
        self._request("forward", chance, "", [Ask((name,), spec=name)])

    # Answers.

    def _answer(
        self, asks: Sequence[Ask], ids: Tensor, logits: Tensor, begin: float, named: float, again: bool = False
    ) -> None:
        """Takes rows of an answer to be compared with what each of them may be.

        Args:
            asks: what was asked for.
            ids: the tokens.
            logits: what was given.
            begin: when it was asked for,
            named: and when the Runtime had taken it.
            again: whether it was put on again, when rows whose adapter was deleted wear the base model.
        """
        for row, ask in enumerate(asks):
            choices: list[tuple[int, ...]] = [()]
            for name in ask.names:
                contents = [each for each in self.names.possible(name, begin, named) if isinstance(each, int)]
                choices = [(*choice, content) for choice in choices for content in contents]
            worn = [Worn(choice, ask.kind, ask.weights) for choice in choices]
            if again and any(UNKNOWN in self.names.possible(name, begin, time.monotonic()) for name in ask.names):
                worn.append(Worn())
            self._compare_later(ids[row], logits[row], worn, str(ask.spec))

    def _compare_later(self, ids: Tensor, logits: Tensor, worn: list[Worn], told: str) -> None:
        with self._lock:
            waiting = self._waiting.setdefault(len(ids), [])
            waiting.append((ids, logits.clone(), worn, told))
            if len(waiting) < _BATCH:
                return
            del self._waiting[len(ids)]
        self._compare(waiting)

    def _compare(self, waiting: list[tuple[Tensor, Tensor, list[Worn], str]]) -> None:
        tries = [(place, worn) for place, (_, _, possible, _) in enumerate(waiting) for worn in possible]
        ids = torch.stack([waiting[place][0] for place, _ in tries])
        with self._truth:
            right = self._reference.logits(ids, [worn for _, worn in tries])
        apart: dict[int, float] = dict.fromkeys(range(len(waiting)), math.inf)
        for (place, _), logits in zip(tries, right, strict=True):
            given = waiting[place][1].double()
            logits = logits[-len(given) :]
            apart[place] = min(apart[place], float((given - logits).norm() / logits.norm()))
        with self._lock:
            self.counts.rows += len(waiting)
        for place, distance in apart.items():
            if not distance <= APART:
                self._wrong(f"{waiting[place][3]}, which is {waiting[place][2]}, is {distance:.2g} away")

    # Memory.

    def _watch(self) -> None:
        while not self.ended.wait(0.2):
            told = self.runtime.stats()
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
            self.seen.append((self.counts.requests, resident, told.device_bytes, told.host_bytes, told.resident))

    def _is_deletable(self, name: str) -> bool:
        return int(name.removeprefix("task")) % 5 == 0

    def _content(self) -> int:
        with self._lock:
            self._contents += 1
            return self._contents


def _ids(rows: int, chance: random.Random) -> Tensor:
    return torch.tensor([[chance.randrange(1, VOCABULARY) for _ in range(LENGTH)] for _ in range(rows)])


def _laid(runtime: ia3rt.Runtime, content: int) -> Tensor:
    """An adapter's vectors in the order of a Runtime's sites."""
    mine = by_site(content)
    return torch.cat([mine[site.path] for site in runtime.sites])


KINDS = {
    "forward": 120,
    "nested": 10,
    "generate": 4,
    "prefetch": 10,
    "get": 8,
    "pin": 3,
    "load": 5,
    "again": 5,
    "hog": 1,
}
FAULTS = ("other_content", "corrupt", "missing")
