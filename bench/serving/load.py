"""Requests as clients send them, and what each has to wait for."""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True)
class Load:
    """What is sent to a server in a round.

    Attributes:
        models: the model that each request names.
        prompt: how many tokens a prompt has; all are different.
        tokens: how many are asked for.
        rate: requests a second, arriving by chance (Poisson) whatever the server does; infinite for all at once.
    """

    models: Sequence[str]
    prompt: int = 32
    tokens: int = 32
    rate: float = math.inf


@dataclass(frozen=True)
class Served:
    """What a round took.

    Attributes:
        tokens_per_second: of all requests together.
        first: seconds to the first token, the median of the requests.
        between: seconds between two tokens of a request, the median of the requests' means.
    """

    tokens_per_second: float
    first: float
    between: float


def send(url: str, load: Load, seed: int) -> Served:
    """Sends a round's requests.

    Args:
        url: the server's.
        load: what is sent.
        seed: of the prompts and of the arrivals; another prompt each time, so that no cache knows it.

    Raises:
        httpx.HTTPStatusError: a request was refused.
    """
    return asyncio.run(_send(url, load, random.Random(seed)))


async def _send(url: str, load: Load, draw: random.Random) -> Served:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        start = time.perf_counter()
        running = []
        try:
            for model in load.models:
                prompt = [draw.randrange(1000, 40_000) for _ in range(load.prompt)]
                running.append(asyncio.create_task(_one(client, model, prompt, load.tokens)))
                if math.isfinite(load.rate):
                    await asyncio.sleep(draw.expovariate(load.rate))
            taken = await asyncio.gather(*running)
        finally:  # where one was refused, or after Ctrl-C, the others end before the client does
            for request in running:
                request.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        whole = time.perf_counter() - start
    firsts = [first for first, _ in taken]
    return Served(len(taken) * load.tokens / whole, statistics.median(firsts), statistics.median(b for _, b in taken))


async def _one(client: Any, model: str, prompt: list[int], tokens: int) -> tuple[float, float]:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    start = time.perf_counter()
    moments = []
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.is_error:
            await answer.aread()
            answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                moments.append(time.perf_counter())
    return moments[0] - start, (moments[-1] - moments[0]) / max(1, tokens - 1)
