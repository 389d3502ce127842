"""The benchmarks' server, and what it counts."""

from __future__ import annotations

import httpx

from ia3rt.bench.serving import server


class Server(server.Server):
    """A server whose metrics are read."""

    def metrics(self) -> dict[str, float]:
        """The numbers of /metrics, by name and labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if x and x[0] != "#")}
