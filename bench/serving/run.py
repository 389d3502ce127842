"""Runs the servers side by side and sends each the same load, in turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ia3rt.bench.interleaved import sample_interleaved
from ia3rt.bench.machine import machine, versions
from ia3rt.bench.profile.memory import RANK
from ia3rt.bench.result import CONTROL, Measurement
from ia3rt.bench.serving.adapters import ia3_folders, lora_folders
from ia3rt.bench.serving.load import Load, Served, send
from ia3rt.bench.serving.server import BASE, Server
from ia3rt.bench.suites.mixed import worn

SLOTS = 32
"""Different adapters in one batch at most."""
COMPILED = "-compiled"
NOTES = {
    "lora": f"LoRA of rank {RANK}; on a CPU vLLM runs a fallback in plain torch for it, and no kernels",
    "ia3rt-compiled": "on a CPU vLLM 0.32 compiles nothing where adapters are enabled, so there it is ia3rt once more",
}


@dataclass(frozen=True)
class Case:
    """What is sent.

    Attributes:
        adapters: how many are loaded.
        requests: how many are sent in a round.
        popularity: how they name adapters; see suites/mixed.py.
    """

    adapters: int
    requests: int
    popularity: str

    def __str__(self) -> str:
        """As tables name it."""
        requests = "1 request" if self.requests == 1 else f"{self.requests} requests"
        return f"{requests}, {self.popularity} of {self.adapters:,}"


@dataclass
class Timed:
    """What a case took.

    Attributes:
        case: what was sent.
        rounds: by contender, what each round took; CONTROL is the base server once more.
    """

    case: Case
    rounds: dict[str, list[Served]] = field(default_factory=dict)

    def measured(self, contender: str, figure: str) -> Measurement:
        """One figure of one contender, with its ratio to the base server's in the same round."""

        def samples(name: str) -> list[float]:
            return [getattr(taken, figure) for taken in self.rounds[name]]

        return Measurement.of(contender, samples(contender), None if contender == BASE else samples(BASE))


def cases(quick: bool) -> list[Case]:
    """What is timed: few or many adapters, all alike, all different, or by Zipf's law; quick, two of them."""
    all_cases = [Case(1, 1, "identical"), Case(8, 8, "distinct")]
    if not quick:
        all_cases += [Case(1, 8, "identical"), Case(32, 32, "distinct"), Case(32, 32, "zipf"), Case(1000, 32, "zipf")]
    return all_cases


def time_servers(
    model: Path,
    contenders: Sequence[str],
    cases: Sequence[Case],
    rounds: int,
    rate: float,
    done: Callable[[str], None],
) -> list[Timed]:
    """Starts the contenders' servers and times all cases. Ctrl-C ends it early: what was timed is returned.

    Args:
        model: a folder with the model, as vLLM reads it.
        contenders: of base, ia3rt, lora, base-compiled, ia3rt-compiled; base is always there.
        cases: what is sent.
        rounds: of each case, after one that is not counted.
        rate: requests a second; see Load.
        done: told what was done.

    Raises:
        RuntimeError: a server did not start.
    """
    timed = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="ia3rt-serve-")))
        most = max(case.adapters for case in cases)
        servers = {}
        for name in dict.fromkeys([BASE, *contenders]):
            own = folder / name
            own.mkdir()
            servers[name] = Server(model, _options(name, model, own, most), own)
            servers[name].start()
            stack.callback(servers[name].kill)
            servers[name].wait()
            done(f"{name}: its server is up")
        try:
            for case in cases:
                timed.append(_time(case, servers, rounds, rate))
                done(str(case))
        except KeyboardInterrupt:
            done("stopped: the cases that were timed are kept")
    return timed


def _options(name: str, model: Path, folder: Path, adapters: int) -> list[str]:
    options = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "32", "--no-enable-prefix-caching"]
    kind = name.removesuffix(COMPILED)
    if kind == name:
        options.append("--enforce-eager")
    if kind == BASE:
        return options
    made = (ia3_folders if kind == "ia3rt" else lora_folders)(model, folder / "adapters", adapters)
    named = [f"task{number}={path}" for number, path in enumerate(made)]
    options += ["--enable-lora", "--max-lora-rank", "1" if kind == "ia3rt" else str(RANK)]
    options += ["--max-loras", str(min(SLOTS, adapters)), "--max-cpu-loras", str(adapters)]
    return [*options, "--lora-target-modules", "k_proj", "v_proj", "down_proj", "--lora-modules", *named]


def _time(case: Case, servers: dict[str, Server], rounds: int, rate: float) -> Timed:
    names = worn(case.popularity, case.requests, case.adapters)
    timed = Timed(case, {name: [] for name in [*servers, CONTROL]})

    def sending(name: str) -> Callable[[int], None]:
        kind = BASE if name == CONTROL else name
        load = Load([BASE] * case.requests if kind.removesuffix(COMPILED) == BASE else names, rate=rate)
        return lambda turn: timed.rounds[name].append(send(servers[kind].url, load, seed=turn))

    sample_interleaved({name: sending(name) for name in timed.rounds}, range(-1, rounds))
    for taken in timed.rounds.values():
        del taken[0]  # this round warmed the servers up
    return timed


def as_dict(timed: Sequence[Timed], command: str, model: str) -> dict[str, Any]:
    """What a run leaves behind, for JSON."""
    plain = [
        {"case": asdict(one.case), "rounds": {k: [asdict(r) for r in v] for k, v in one.rounds.items()}}
        for one in timed
    ]
    return {"command": command, "model": model, "machine": machine(), "versions": versions(), "cases": plain}


def read(file: Path) -> tuple[dict[str, Any], list[Timed]]:
    """A run that was written; what was run, and what it took."""
    plain = json.loads(file.read_text("utf-8"))
    timed = [
        Timed(Case(**one["case"]), {k: [Served(**taken) for taken in v] for k, v in one["rounds"].items()})
        for one in plain["cases"]
    ]
    return plain, timed
