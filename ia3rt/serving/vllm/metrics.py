"""What Prometheus is told, in vLLM's own /metrics."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from prometheus_client import Counter, Gauge
from vllm.lora.request import LoRARequest
from vllm.v1.engine.output_processor import RequestState
from vllm.v1.worker.worker_base import WorkerBase

from ia3rt.serving.vllm.requests import kind, public_name

SECONDS = 5.0
"""How old the workers' numbers may be while requests come in."""

LABEL = "IA3"
"""What vLLM's own metrics call whatever is IA³."""
REQUESTS = Counter("ia3rt:requests", "Requests that wear IA³, by what they wear.", ["kind"])
REFUSED = Counter("ia3rt:loads_refused", "IA³ adapters that could not be loaded.")
SLOTS = Gauge("ia3rt:slots", "Slots for adapters of either kind.", multiprocess_mode="mostrecent")
RESIDENT = Gauge("ia3rt:slots_resident", "Slots that hold an IA³ adapter or mix.", multiprocess_mode="mostrecent")
LOADS = Counter("ia3rt:loads", "IA³ adapters and mixes that the first worker read and composed.")
LOAD_SECONDS = Counter("ia3rt:load_seconds", "Seconds that this took.")
EVICTIONS = Counter("ia3rt:evictions", "IA³ adapters and mixes that lost their slot to another.")
_FROM_WORKERS = {"loads": LOADS, "load_seconds": LOAD_SECONDS, "evictions": EVICTIONS}


def count(request: LoRARequest | None, engine: Any) -> None:
    """Counts a request, where it wears IA³."""
    worn = None if request is None else kind(request)
    if worn is not None:
        REQUESTS.labels(worn).inc()
        watch(engine)


def watch(engine: Any) -> None:
    """Asks the workers, soon, what they have counted."""
    _Watch.is_stale = True
    if _Watch.task is None or _Watch.task.done():
        _Watch.task = asyncio.get_running_loop().create_task(_follow(engine))


def install() -> None:
    """Gives vLLM's workers the method that `watch` asks them for, and its labels a bounded number of values."""
    WorkerBase.ia3rt_counts = _counts
    RequestState.__init__ = _labelled(RequestState.__init__)


def _labelled(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        """A request as vLLM's statistics know it.

        Its labels join the names of all that run and of all that wait, and keep a series for every such text: of mixes,
        which clients write, and of sets of adapters there is no end.
        """
        original(self, *args, **kwargs)
        if self.lora_request is not None:
            self.lora_name = public_name(self.lora_name) if kind(self.lora_request) is None else LABEL

    return init


class _Watch:
    task: asyncio.Task[None] | None = None
    is_stale = False
    last: ClassVar[Mapping[str, float]] = {}
    """What the worker said when it was last asked: its numbers only grow, and so do Prometheus's counters."""


def _counts(worker: Any) -> dict[str, float]:
    """What this worker's manager has counted."""
    manager = worker.model_runner.lora_manager
    return {**manager.ia3_counts, **manager._adapter_manager.ia3_counts()}


async def _follow(engine: Any) -> None:
    while True:
        if _Watch.is_stale:
            _Watch.is_stale = False
            now = (await engine.collective_rpc("ia3rt_counts"))[0]
            SLOTS.set(now["slots"])
            RESIDENT.set(now["resident"])
            for name, counter in _FROM_WORKERS.items():
                counter.inc(max(0.0, now[name] - _Watch.last.get(name, 0.0)))
            _Watch.last = now
        await asyncio.sleep(SECONDS)
