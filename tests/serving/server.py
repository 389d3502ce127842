"""The benchmarks' server, what it counts, and asking it."""

from __future__ import annotations

import asyncio

import httpx
import openai
import psutil
from truth import NEW_TOKENS

from ia3rt.bench.serving import server


class Server(server.Server):
    """A server whose metrics are read."""

    def metrics(self) -> dict[str, float]:
        """The numbers of /metrics, by name and labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if x and x[0] != "#")}

    def memory(self) -> float:
        """Bytes of memory that its processes have."""
        process = psutil.Process(self._process.pid)
        return float(sum(each.memory_info().rss for each in (process, *process.children(recursive=True))))


def client(server: Server) -> openai.AsyncOpenAI:
    # A connection each: the server closes those that were idle for a while, maybe as a request is on its way.
    close = {"Connection": "close"}
    return openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300, default_headers=close
    )


async def ask(api: openai.AsyncOpenAI, model: str, prompt: list[int], **extra: object) -> list[int]:
    body = {"return_token_ids": True, "ignore_eos": True, **extra}
    answer = await api.completions.create(
        model=model, prompt=prompt, max_tokens=NEW_TOKENS, temperature=0, extra_body=body
    )
    return answer.choices[0].model_extra["token_ids"]


def say(server: Server, model: str, prompt: list[int], **extra: object) -> list[int]:
    async def once() -> list[int]:
        async with client(server) as api:
            return await ask(api, model, prompt, **extra)

    return asyncio.run(once())
