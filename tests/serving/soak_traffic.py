"""The soak's innocent clients: requests by Zipf's law over a thousand adapters and mixes of them, and the answers."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import numpy as np
from soak_truth import LORA, Worn

ADAPTERS = 1000
AT_ONCE = 32
NEW_TOKENS = 6
PREFIX, SUFFIXES = 32, (4, 12, 24)
"""Tokens: a block of the cache that many requests have in common, and what is their own."""
UNREADABLE = (404, 500, 503, 507)
"""What a request is answered with whose adapter was read, or written anew, just when somebody did something to it; 404
where a resolver looked for it."""
SWAPPED = ("chat", "draft")
"""Names that mean one thing after another, of both kinds."""


@dataclass
class Version:
    """What a name means from some time on.

    Attributes:
        worn: what it stands for.
        asked: when that was asked for,
        answered: and when it was so.
    """

    worn: Worn
    asked: float
    answered: float = float("inf")


@dataclass
class Traffic:
    """What goes to a server, and what it answered.

    Attributes:
        url: the server's.
        chance: what everything random here comes from.
        asked: a prompt, its answer, and what may have been worn, of each request that was answered.
        failed: how many requests the server could not answer, as their adapters could not be read, and said so.
        wrong_statuses: what no request should be answered with.
        versions: what each swapped name has meant, in order.
        troubles: when something happened to the store, or to an original: its beginning and its end.
        counts: how often each kind of request and of fault was made.
    """

    url: str
    chance: random.Random
    asked: list[tuple[tuple[int, ...], list[int], tuple[Worn, ...]]] = field(default_factory=list)
    failed: int = 0
    wrong_statuses: list[str] = field(default_factory=list)
    versions: dict[str, list[Version]] = field(default_factory=dict)
    troubles: list[list[float]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._prefixes = [tuple(self._tokens(PREFIX)) for _ in range(20)]
        self._of_rank = self.chance.sample(range(ADAPTERS), ADAPTERS)
        self._zipf = np.cumsum(1 / np.arange(1, ADAPTERS + 1))

    def adapter(self) -> int:
        """An adapter's number, by Zipf's law."""
        return self._of_rank[int(np.searchsorted(self._zipf, self.chance.random() * self._zipf[-1]))]

    def adapters(self, count: int) -> tuple[int, ...]:
        """As many different ones."""
        found: dict[int, None] = {}
        while len(found) < count:
            found[self.adapter()] = None
        return tuple(found)

    def prompt(self) -> tuple[int, ...]:
        return (*self.chance.choice(self._prefixes), *self._tokens(self.chance.choice(SUFFIXES)))

    def _tokens(self, count: int) -> list[int]:
        return [self.chance.randrange(256) for _ in range(count)]

    async def one(self, http: httpx.AsyncClient) -> None:
        """Asks for an answer, and keeps it."""
        kind = self.chance.choices(list(KINDS), list(KINDS.values()))[0]
        name, worn, more = getattr(self, f"_{kind}")()
        prompt, begun = self.prompt(), time.monotonic()
        body = dict(model=name, prompt=list(prompt), max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
        response = await http.post(f"{self.url}/v1/completions", json={**body, "return_token_ids": True, **more})
        self.counts[kind] += 1
        # vLLM's resolvers have one sentence for all that they found and could not load.
        is_unreadable = response.status_code in UNREADABLE or "was found but could not be loaded" in response.text
        if is_unreadable and worn != Worn() and self._is_troubled(begun):
            self.failed += 1
        elif response.status_code != 200:
            self.wrong_statuses.append(f"{kind} {name[:80]}: {response.status_code} {response.text[:300]}")
        else:
            tokens = response.json()["choices"][0]["token_ids"]
            self.asked.append((prompt, tokens, (worn,) if worn else self._possible(name, begun)))

    def _is_troubled(self, begun: float) -> bool:
        return any(end > begun for _, end in self.troubles[-100:])

    def _possible(self, name: str, begun: float) -> tuple[Worn, ...]:
        """What a swapped name may have meant at some moment from then till now."""
        versions = self.versions[name]
        until = [later.answered for later in versions[1:]] + [float("inf")]
        return tuple(dict.fromkeys(each.worn for each, end in zip(versions, until, strict=True) if end >= begun))

    def _base(self) -> tuple[str, Worn, dict]:
        return "base", Worn(), {}

    def _alone(self) -> tuple[str, Worn, dict]:
        number = self.adapter()
        return str(number), Worn((number,)), {}

    def _lora(self) -> tuple[str, Worn, dict]:
        return "lora", LORA, {}

    def _product(self) -> tuple[str, Worn, dict]:
        numbers = self.adapters(self.chance.choice((2, 2, 3)))
        return "*".join(map(str, numbers)), Worn(numbers), {}

    def _sum(self) -> tuple[str, Worn, dict]:
        numbers = self.adapters(self.chance.choice((1, 2, 2, 3, 4)))
        kind = self.chance.choice(("linear", "delta"))
        weights = tuple(round(self.chance.uniform(-0.4, 1), 6) for _ in numbers)
        prefix = {"linear": "mix:", "delta": "delta:"}[kind]
        terms = "+".join(f"{number}*{weight}" for number, weight in zip(numbers, weights, strict=True))
        return prefix + terms, Worn(numbers, kind, weights), {}

    def _in_the_body(self) -> tuple[str, Worn, dict]:
        numbers = self.adapters(2)
        weights = tuple(round(self.chance.uniform(0, 1), 2) for _ in numbers)
        body = {"ids": list(map(str, numbers)), "weights": list(weights), "merge_strategy": "linear"}
        return "base", Worn(numbers, "linear", weights), {"merged_adapters": body}

    def _large(self) -> tuple[str, Worn, dict]:
        """Many adapters in one, as nobody has asked for before."""
        numbers = self.adapters(64)
        weights = tuple(round(self.chance.uniform(-0.03, 0.06), 6) for _ in numbers)
        terms = "+".join(f"{number}*{weight}" for number, weight in zip(numbers, weights, strict=True))
        return f"mix:{terms}", Worn(numbers, "linear", weights), {}

    def _swapped(self) -> tuple[str, None, dict]:
        return self.chance.choice(SWAPPED), None, {}


KINDS = {"alone": 50, "base": 10, "product": 14, "sum": 12, "in_the_body": 5, "swapped": 5, "lora": 3, "large": 1}
"""The kinds of requests, and how many of a hundred."""


def http_client() -> httpx.AsyncClient:
    """A client that asks by no connection that the server may be about to close, as it closes those that rest 5 s."""
    return httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=2 * AT_ONCE, keepalive_expiry=2))


async def send(traffic: Traffic, seconds: float, requests: int) -> None:
    """Keeps a server busy for so long, or so many requests."""
    end = time.monotonic() + seconds
    async with http_client() as http:

        async def client() -> None:
            while time.monotonic() < end and sum(traffic.counts[kind] for kind in KINDS) < requests:
                await traffic.one(http)

        await asyncio.gather(*(client() for _ in range(AT_ONCE)))
