"""What a call of a compiled model costs the host: `python -m ia3rt.bench calling`. No GPU is needed.

Models are compiled with a backend that computes nothing: what is timed is what torch does at each call besides, mostly
checks whether what it compiled still holds. Each is timed in a process of its own, as what torch compiled of one model
would be looked through for the next.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

CALLS, ROUNDS = 2000, 5
LAYERS = (2, 16)
CONTENDERS = ("base", "base again", "peft", "ia3rt", "ia3rt, torch backend", "torch backend, a mix a row")


@dataclass(frozen=True)
class CallTime:
    """What calls of one model cost.

    Attributes:
        contender: what was compiled.
        microseconds: by layers, the least of the rounds' medians: other programs only add to it.
    """

    contender: str
    microseconds: dict[int, float]


def call_times() -> Iterator[CallTime]:
    """Time each contender, a process after another, round after round."""
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for layers in LAYERS:
            for contender in CONTENDERS:
                times.setdefault((contender, layers), []).append(_timed(contender, layers))
    for contender in CONTENDERS:
        yield CallTime(contender, {layers: min(times[contender, layers]) for layers in LAYERS})


def _timed(contender: str, layers: int) -> float:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", __name__, contender, str(layers)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"timing calls of {contender} failed: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def microseconds(contender: str, layers: int, calls: int) -> float:
    """Return the median of so many calls of one model, without gradients."""
    import torch

    model, rows = _model(contender, layers)
    compiled: Any = torch.compile(model, backend=_nothing)
    ids = torch.zeros(rows, 8, dtype=torch.int64)
    taken = []
    with torch.no_grad():
        for _ in range(calls):
            begun = time.perf_counter()
            compiled(input_ids=ids, use_cache=False)
            taken.append(time.perf_counter() - begun)
    return 1e6 * statistics.median(taken)


def _model(contender: str, layers: int) -> tuple[Any, int]:
    """The model, compiled by nobody yet, and how many rows a batch of it has."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    config: Any = LlamaConfig(**sizes, num_hidden_layers=layers)  # type: ignore[arg-type]
    model = LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    if contender.startswith("base"):
        return model, 1
    if contender == "peft":
        from peft import IA3Config, get_peft_model

        return get_peft_model(model, IA3Config(task_type="CAUSAL_LM")).eval(), 1
    import ia3rt

    backend: Literal["torch", "triton"] = "triton" if contender == "ia3rt" else "torch"
    if backend == "triton":
        from ia3rt.bench.compiled.driver import stop_at_launches

        stop_at_launches(lambda *_: None)
    runtime = ia3rt.patch(model, backend=backend)
    names = ["a", "b", "c", "d"]
    for name in names:
        runtime.add_adapter(name, {site.key: torch.ones(site.width) for site in runtime.sites})
    if contender == "torch backend, a mix a row":
        runtime.route(names)
        return model, len(names)
    runtime.set_adapter("a")
    return model, 1


def _nothing(graph: Any, _: object) -> Callable[..., object]:
    """A compiler's backend: the first call computes, and the others give its results."""
    results: list[object] = []

    def run(*inputs: object) -> object:
        if not results:
            results.append(graph.forward(*inputs))
        return results[0]

    return run


if __name__ == "__main__":
    print(json.dumps(microseconds(sys.argv[1], int(sys.argv[2]), CALLS)))
